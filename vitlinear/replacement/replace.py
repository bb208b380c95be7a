"""Other attentions in the place of timm's, in a model that is there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from vitlinear._timm import NaFlexVit, SamAttention, SwinAttention, update_model_args
from vitlinear.errors import did_you_mean
from vitlinear.mixers import describe_attention, make_mixer
from vitlinear.mixers.attention import check_rope

from .attentions import (
    REPLACED,
    ReplacedAttention,
    ReplacedMapAttention,
    ReplacedWindowAttention,
)
from .blocks import Place, find_attentions, select_blocks
from .kinds import PARTS, parts_of, why_not
from .report import Replacement, ReplacementReport
from .token_map import TokenMap, token_map

# The model of the registry that a replaced one is saved as; see `rebuild.py`.
ARCHITECTURE = "replaced_attention"


def replace_attention(
    model: nn.Module,
    name: str,
    blocks: str | int | slice | Sequence[int] | None = None,
    keep: Iterable[str] | None = None,
    *,
    rope: bool = False,
    **options: Any,
) -> ReplacementReport:
    """Replace attentions of a timm model by another of the registry, in place.

    Projections keep their modules, weights and names; so do the parts that are kept. What the new
    attention learns stands under ``mixer``, with its initial values. Nothing is changed if an error
    is raised.

    A model from ``timm.create_model`` afterwards is ``replaced_attention`` of timm's registry, so
    that ``save_for_hf`` and ``push_to_hf_hub`` write what builds it again where ``vitlinear`` is
    imported.

    Args:
        model: Any that has attentions of the kinds of `kinds.KINDS`.
        name: One of `vitlinear.list_attentions()`.
        blocks: Which blocks, in timm's order: a slice (``"6:"``, ``"::2"``), or numbers
            (``"0,3"``, 3, ``[0, 3]``), negative ones from the end; None for all.
        keep: Parts of timm's attention that stay, of `kinds.PARTS`. An attention with a part that
            is to stay and cannot is refused; a part that is not named is left out. None names all.
        rope: Whether the new attention has 2-D rotary positions of its own, beside those of the
            model.
        **options: Those of the new attention; ``vitlinear attentions NAME`` lists them.

    Returns:
        What became of each attention of these blocks. Those that were refused are as they were.

    Raises:
        ValueError: A name or option is unknown, the model has no attention, nothing is selected,
            or all that is selected was refused; one line.
    """
    describe_attention(name).check_options(options)
    kept = _kept_parts(keep)
    places = find_attentions(model)
    kind = type(model).__name__
    if not places:
        raise ValueError(f"{kind} has no attention of timm's that could be replaced")
    number = 1 + max(place.block for place in places)
    chosen = set(select_blocks(blocks, number))
    rows: list[Replacement] = []
    made: list[tuple[Place, ReplacedAttention]] = []
    for place in places:
        if place.block not in chosen:
            continue
        was = getattr(place.module, "was", type(place.module).__name__)
        try:
            new, dropped = _replacement(place, name, kept, rope, options)
        except _Refused as refusal:
            rows.append(Replacement(place.block, place.name, was, None, (), str(refusal)))
            continue
        made.append((place, new))
        rows.append(Replacement(place.block, place.name, was, name, dropped, ""))
    if not made:
        raise ValueError(f"nothing of {kind} can be replaced by {name}: {rows[0].reason}")
    for place, new in made:
        parent, _, attribute = place.name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)
        if new.token_map is not None:
            new.token_map.watch()
        if isinstance(place.owner, NaFlexVit):
            place.owner.use_key_only_attn_mask = True  # instead of one for each query
    done = {
        "attention": name,
        "blocks": sorted({place.block for place, _ in made}),
        "keep": sorted(kept),
        "rope": rope,
        "options": dict(options),
    }
    _record(model, done)
    return ReplacementReport(rows)


class _Refused(Exception):
    """An attention stays as it is; the message says why."""


def _kept_parts(keep: Iterable[str] | None) -> set[str]:
    """The parts that are to stay.

    Raises:
        ValueError: There is no such part.
    """
    if keep is None:
        return set(PARTS)
    parts = {keep} if isinstance(keep, str) else set(keep)
    for part in sorted(parts - PARTS.keys()):
        raise ValueError(
            f"keep: there is no part {part!r}{did_you_mean(part, PARTS)}; it may name "
            f"{', '.join(PARTS)}"
        )
    return parts


def _replacement(
    place: Place, name: str, keep: set[str], rope: bool, options: dict[str, Any]
) -> tuple[ReplacedAttention, tuple[str, ...]]:
    """An attention in the place of another, and the parts that it is without.

    Raises:
        _Refused: The attention has to stay.
        ValueError: The mixer cannot be made for any attention of this size.
    """
    old: Any = place.module
    again = isinstance(old, ReplacedAttention)
    reason = None if again else why_not(old)
    if reason:
        raise _Refused(reason)
    parts = set(old.parts) if again else parts_of(old, place.owner)
    if "bias" in parts & keep:
        raise _Refused(
            f"adds a table of biases to its logits, which {name} has none of: leave 'bias' out of "
            "keep to do without"
        )
    dropped = [part for part in PARTS if part in parts - keep]
    if not again and old.attn_drop.p > 0:
        dropped.append("attn_drop")
    weight = old.proj.weight
    dim = weight.shape[1]
    inside = old.qkv.in_features if old.qkv is not None else old.q_proj.in_features
    description = describe_attention(name)
    if description.needs_input and inside != dim:
        raise _Refused(
            f"{name} reads the input of the layer, whose {inside} channels are not the {dim} of "
            "its heads"
        )
    spec = {"name": name, **options}
    mixer = make_mixer(spec, dim, old.num_heads, device=weight.device, dtype=weight.dtype)
    if rope:
        check_rope(mixer)
    knows_map = (SwinAttention, SamAttention, ReplacedWindowAttention, ReplacedMapAttention)
    where: TokenMap | None = None
    if (rope or mixer.order != "free") and not isinstance(old, knows_map):
        try:
            where = token_map(place.owner)
        except ValueError as error:
            raise _Refused(f"{name}{' with rope' if rope else ''} {error}") from None
    cls = type(old) if again else REPLACED[type(old)]
    prefix = int(getattr(place.owner, "num_prefix_tokens", 0))
    new = cls(old, mixer, parts & keep, rope=rope, token_map=where, num_prefix_tokens=prefix)
    return new, tuple(dropped)


def _record(model: Any, done: dict[str, Any]) -> None:
    """Note in a model of timm's factory how it is built again.

    timm saves the architecture of ``pretrained_cfg`` and the arguments of the factory.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(cfg, dict) or not cfg.get("architecture"):
        return
    arguments = getattr(model, "_model_args", {})
    if cfg["architecture"] != ARCHITECTURE:
        update_model_args(model, base=cfg["architecture"])
        model.pretrained_cfg = model.default_cfg = {**cfg, "architecture": ARCHITECTURE}
    update_model_args(model, replacements=[*arguments.get("replacements", ()), done])
