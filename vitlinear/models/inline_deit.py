"""InLine-DeiT: injective linear attention with a dynamic local term in DeiT.

`Bridging the Divide: Reconsidering Softmax and Linear Attention` (InLine, NeurIPS 2024)
- paper: https://arxiv.org/abs/2412.06590
- code and weights by the authors: https://github.com/LeapLabTHU/InLine

Written from the definition. The variants are narrower than those of DeiT and trained at larger
images, as released; positions are resized for images of other sizes.
"""

from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model

from vitlinear.facts import pretrained_source
from vitlinear.layers.attention.inline_attention import InLineTokenAttention

from ._build import build_model
from ._deit import DeiT
from ._inline import INLINE
from ._isotropic import token_cfg

__all__ = ["InLineDeiT"]


class InLineDeiT(DeiT):
    """DeiT with InLine attention in all blocks."""

    def __init__(self, **kwargs: Any) -> None:
        """Make the model.

        Args:
            **kwargs: As for `DeiT`.

        Raises:
            ValueError: As `DeiT`.
            AssertionError: The pooling is not supported.
        """
        super().__init__(partial(InLineTokenAttention, num_prefix_tokens=1), **kwargs)


# Source: released code, models/inline_deit.py and cfgs/.
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "num_heads": 6},
    "small": {"embed_dim": 320, "num_heads": 10, "img_size": 288},
    "base": {"embed_dim": 384, "num_heads": 12, "img_size": 448},
    # Ours, for tests and small data sets.
    "test": {"embed_dim": 64, "num_heads": 2, "depth": 4, "img_size": 96},
}


def _cfg(side: int, **kwargs: Any) -> dict[str, Any]:
    # Fixed: img_size reaches the constructor, which makes positions of that grid.
    return token_cfg(side, fixed_input_size=True, **INLINE, **kwargs)


def _published(name: str, side: int) -> dict[str, dict[str, Any]]:
    return {f"{name}.in1k": _cfg(side, **pretrained_source(name))}


default_cfgs = generate_default_cfgs(
    {
        **_published("inline_deit_tiny", 224),
        **_published("inline_deit_small", 288),
        **_published("inline_deit_base", 448),
        "test_inline_deit.untrained": _cfg(96),
    }
)


@register_model
def inline_deit_tiny(pretrained: bool = False, **kwargs: Any) -> InLineDeiT:
    """InLine-DeiT-T: 6.5M parameters, 74.5% ImageNet-1K top-1 at 224 as published."""
    return build_model(InLineDeiT, "inline_deit_tiny", pretrained, **{**VARIANTS["tiny"], **kwargs})


@register_model
def inline_deit_small(pretrained: bool = False, **kwargs: Any) -> InLineDeiT:
    """InLine-DeiT-S: 16.7M parameters, 80.2% ImageNet-1K top-1 at 288 as published."""
    return build_model(
        InLineDeiT, "inline_deit_small", pretrained, **{**VARIANTS["small"], **kwargs}
    )


@register_model
def inline_deit_base(pretrained: bool = False, **kwargs: Any) -> InLineDeiT:
    """InLine-DeiT-B: 23.8M parameters, 82.3% ImageNet-1K top-1 at 448 as published."""
    return build_model(InLineDeiT, "inline_deit_base", pretrained, **{**VARIANTS["base"], **kwargs})


@register_model
def test_inline_deit(pretrained: bool = False, **kwargs: Any) -> InLineDeiT:
    """A small InLine-DeiT for tests and small data sets."""
    return build_model(InLineDeiT, "test_inline_deit", pretrained, **{**VARIANTS["test"], **kwargs})
