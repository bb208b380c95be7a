"""LinearDeiT: DeiT with plain linear attention in the place of softmax, and nothing else.

The baseline to compare linear attentions with: out = phi(q) (phi(k)^T v) / (phi(q) sum phi(k)) as
in `Transformers are RNNs` (ICML 2020, https://arxiv.org/abs/2006.16236), with phi either elu + 1 as
there or ReLU, in the layout of DeiT (https://arxiv.org/abs/2012.12877). No weights are published.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from vitlinear.layers import LinearAttention, learns_temperature
from vitlinear.mixers import AttentionSpec, attention_of_spec

from ._build import build_model
from ._deit import DeiT
from ._isotropic import token_cfg

__all__ = ["LinearDeiT"]


class LinearDeiT(DeiT):
    """DeiT with one linear attention in all blocks."""

    def __init__(
        self,
        attn_type: str = "elu",
        attention: AttentionSpec | None = None,
        rope: bool = False,
        qk_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        """Make the model.

        Args:
            attn_type: A mechanism of `vitlinear.ops.MECHANISMS`, here without positions of its
                own, or ``'softmax'``, which makes this DeiT.
            attention: Any attention of `vitlinear.list_attentions()` in its place; one with
                options is a mapping, such as ``{"name": "taylor", "degree": 1}``.
            rope: With ``attention``: give the tokens of the map 2-D rotary positions.
            qk_norm: With ``attention``: put queries and keys through an RMS norm.
            **kwargs: As for `DeiT`.

        Raises:
            ValueError: An attention or option is unknown, or as `DeiT`.
            AssertionError: The pooling is not supported.
        """
        attn_layer: Callable[..., nn.Module]
        if attention is not None:
            # One token before the map: the class token.
            attn_layer = partial(
                attention_of_spec, attention, num_prefix_tokens=1, rope=rope, qk_norm=qk_norm
            )
        elif rope or qk_norm:
            raise ValueError("rope and qk_norm are for an attention by name: give attention=...")
        else:
            attn_layer = partial(
                LinearAttention, attn_type=attn_type, temperature=learns_temperature(attn_type)
            )
        super().__init__(attn_layer, **kwargs)


VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "num_heads": 3},
    "small": {"embed_dim": 384, "num_heads": 6},
    # Ours, for tests and small data sets.
    "test": {"embed_dim": 64, "num_heads": 2, "depth": 4, "img_size": 96},
}


def _cfg(side: int = 224) -> dict[str, Any]:
    return token_cfg(
        side,
        paper_ids="arXiv:2006.16236",
        paper_name="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        fixed_input_size=True,  # img_size reaches the constructor: positions of that grid
    )


default_cfgs = generate_default_cfgs(
    {
        "linear_deit_tiny.untrained": _cfg(),
        "linear_deit_small.untrained": _cfg(),
        "linear_deit_tiny_relu.untrained": _cfg(),
        "linear_deit_small_relu.untrained": _cfg(),
        "test_linear_deit.untrained": _cfg(96),
    }
)


@register_model
def linear_deit_tiny(pretrained: bool = False, **kwargs: Any) -> LinearDeiT:
    """DeiT-T with linear attention, elu + 1."""
    return build_model(LinearDeiT, "linear_deit_tiny", pretrained, **{**VARIANTS["tiny"], **kwargs})


@register_model
def linear_deit_small(pretrained: bool = False, **kwargs: Any) -> LinearDeiT:
    """DeiT-S with linear attention, elu + 1."""
    return build_model(
        LinearDeiT, "linear_deit_small", pretrained, **{**VARIANTS["small"], **kwargs}
    )


@register_model
def linear_deit_tiny_relu(pretrained: bool = False, **kwargs: Any) -> LinearDeiT:
    """DeiT-T with linear attention, ReLU."""
    model_args = {**VARIANTS["tiny"], "attn_type": "relu"}
    return build_model(LinearDeiT, "linear_deit_tiny_relu", pretrained, **{**model_args, **kwargs})


@register_model
def linear_deit_small_relu(pretrained: bool = False, **kwargs: Any) -> LinearDeiT:
    """DeiT-S with linear attention, ReLU."""
    model_args = {**VARIANTS["small"], "attn_type": "relu"}
    return build_model(LinearDeiT, "linear_deit_small_relu", pretrained, **{**model_args, **kwargs})


@register_model
def test_linear_deit(pretrained: bool = False, **kwargs: Any) -> LinearDeiT:
    """A small LinearDeiT for tests and small data sets."""
    return build_model(LinearDeiT, "test_linear_deit", pretrained, **{**VARIANTS["test"], **kwargs})
