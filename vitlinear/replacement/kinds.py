"""Which attentions of timm can be replaced, what they consist of, and why others cannot be."""

from __future__ import annotations

from typing import Any

from torch import nn

from vitlinear._timm import (
    Attention,
    AttentionRope,
    BeitAttention,
    EvaAttention,
    RelPosAttention,
    SamAttention,
    SwinAttention,
)

# Parts of timm's attentions beside the projections, which stay around the mixer or go.
PARTS = {
    "qk_norm": "norms of queries and keys",
    "rope": "rotary positions that the model turns queries and keys by",
    "norm": "norm of the output before its projection",
    "gate": "gate of the output before its projection",
    "bias": "table of biases for relative positions",
    "mask": "Swin's mask, by which a shifted window is several regions",
}

KINDS: tuple[type[nn.Module], ...] = (
    Attention,
    AttentionRope,
    EvaAttention,
    BeitAttention,
    RelPosAttention,
    SamAttention,
    SwinAttention,
)

_ONE_QUERY = "has one query, the class token, so its cost is linear already"
_POOLS = "pools queries or keys to another map"
# By class, or by file and class where timm has several of a name.
_REASONS = {
    "TalkingHeadAttn": "mixes the weights of one head into those of others (talking heads)",
    "ClassAttn": _ONE_QUERY,
    "ClassAttention": _ONE_QUERY,
    "CrossAttention": _ONE_QUERY,
    "DiffAttention": "subtracts one softmax from another, on halves of each head",
    "ParallelScalingBlock": "has projections in common with the MLP of its block",
    "DiffParallelScalingBlock": "has projections in common with the MLP of its block",
    "XCA": "attends between channels, so its cost is linear already",
    "ChannelAttention": "attends between channels, so its cost is linear already",
    "ChannelAttentionV2": "attends between channels, so its cost is linear already",
    "MaskUnitAttention": _POOLS,
    "MultiScaleAttention": _POOLS,
    "GlobalSubSampleAttn": _POOLS,
    "pvt_v2.Attention": _POOLS,
    "swin_transformer_v2.WindowAttention": "is cosine attention with a learned scale for each head",
    "WindowMultiHeadAttention": "is cosine attention with a learned scale for each head",
}


def is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention of timm's with heads; poolings are none."""
    cls = type(module)
    if isinstance(module, KINDS):
        return True
    if not cls.__module__.startswith("timm.") or "Pool" in cls.__name__:
        return False
    if cls.__name__ in _REASONS:
        return True
    named = cls.__name__.endswith(("Attention", "Attn", "Attention2d", "AttentionCl"))
    return named and isinstance(getattr(module, "num_heads", None), int)


def why_not(module: nn.Module) -> str | None:
    """Why an attention cannot be replaced, whatever by; None if it can."""
    cls = type(module)
    if cls in KINDS:
        return None
    file = cls.__module__.rpartition(".")[2]
    reason = _REASONS.get(f"{file}.{cls.__name__}") or _REASONS.get(cls.__name__)
    if reason:
        return f"{cls.__name__} {reason}"
    base = next((kind.__name__ for kind in KINDS if isinstance(module, kind)), None)
    if base:
        return f"{cls.__name__} is derived from {base}, and may compute something else"
    return f"{file}.{cls.__name__} is of a kind that there is no rule for"


def parts_of(module: Any, owner: Any) -> set[str]:
    """The parts of `PARTS` that an attention has.

    Args:
        module: One of `KINDS`.
        owner: The model that it is of.
    """
    parts = set()
    if not isinstance(getattr(module, "q_norm", nn.Identity()), nn.Identity):
        parts.add("qk_norm")
    if not isinstance(getattr(module, "norm", nn.Identity()), nn.Identity):
        parts.add("norm")
    if getattr(module, "gate", None) is not None:
        parts.add("gate")
    turned_by = module if isinstance(module, SamAttention) else owner
    if isinstance(module, (AttentionRope, EvaAttention, SamAttention)) and (
        getattr(turned_by, "rope", ...) is not None
    ):
        parts.add("rope")
    tables = [
        getattr(module, "relative_position_bias_table", None),
        getattr(module, "rel_pos", None),
        getattr(module, "rel_pos_h", None),
    ]
    if isinstance(module, RelPosAttention):
        tables.append(getattr(owner, "shared_rel_pos", None))
    if isinstance(module, BeitAttention):
        tables.append(getattr(owner, "rel_pos_bias", None))
    if any(table is not None for table in tables):
        parts.add("bias")
    if isinstance(module, SwinAttention):
        parts.add("mask")
    return parts
