"""InLine-CSwin: the cross-shaped-window transformer with InLine attention in its early stages.

`Bridging the Divide: Reconsidering Softmax and Linear Attention` (InLine, NeurIPS 2024)
- paper: https://arxiv.org/abs/2412.06590
- code and weights by the authors: https://github.com/LeapLabTHU/InLine

Written from the definition. Stages 1 and 2 have InLine attention in windows as large as the map at
the size that the models were trained at, stage 3 softmax in cross-shaped windows, stage 4 softmax
over the whole map.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitlinear.facts import pretrained_source
from vitlinear.layers.attention.cross_shaped_attention import CrossShapedAttention
from vitlinear.layers.band import LOCAL

from ._build import build_model
from ._hosts import ConvNorm, HostBlock, ImageConvNorm
from ._inline import inline_cfg
from ._stages import StagedBackbone, four_each

__all__ = ["InLineCSwin"]


class CrossShapedBlock(HostBlock):
    """A block whose attention also sees its input before the norm."""

    row_rule = LOCAL

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = x + self.drop_path1(self.attn(self.norm1(x), x))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class InLineCSwin(StagedBackbone):
    """Backbone and classifier; takes images of any size, square or not."""

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        attn_types: Sequence[str] = ("inline", "inline", "softmax", "softmax"),
        split_sizes: Sequence[int] = (56, 28, 7, 0),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the model.

        Args:
            in_chans: Channels of the image.
            num_classes: Classes; 0 leaves the classifier out.
            global_pool: ``'avg'``, ``'max'``, ``'avgmax'``, or ``''`` for a map of logits.
            embed_dim: Channels of the first stage; each stage has twice those before it.
            depths: Blocks of each stage.
            num_heads: Attention heads of each stage.
            attn_types: By stage, ``'inline'`` or ``'softmax'``.
            split_sizes: By stage, the greatest side of InLine windows or width of softmax
                stripes, in tokens; 0 for one window, the whole map.
            mlp_ratio: Hidden width of the feed-forward networks over the channels.
            drop_rate: Dropout rate before the classifier.
            proj_drop_rate: Dropout rate of the output of attentions and feed-forward networks.
            drop_path_rate: Stochastic depth rate of the last block, growing linearly from 0.
            attn_backend: One of `vitlinear.ops.BACKENDS`, for the linear attentions.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: The per-stage settings are not four each, or do not fit together.
            AssertionError: The pooling is not supported.
        """
        super().__init__(in_chans, num_classes, global_pool, drop_rate)
        four_each(
            depths=depths, num_heads=num_heads, attn_types=attn_types, split_sizes=split_sizes
        )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dims = [embed_dim * 2**i for i in range(4)]

        def downsample(i: int) -> nn.Module:
            return ConvNorm(dims[i - 1], dims[i], 3, 2, 1, **dd)

        def block(i: int, j: int, drop_path: float) -> HostBlock:
            attn = CrossShapedAttention(
                dims[i],
                num_heads[i],
                attn_types[i],
                split_sizes[i],
                proj_drop_rate,
                attn_backend,
                **dd,
            )
            return CrossShapedBlock(dims[i], attn, mlp_ratio, 1e-5, proj_drop_rate, drop_path, **dd)

        self.stem = ImageConvNorm(in_chans, dims[0], 7, 4, 2, **dd)
        self.make_stages(dims, depths, drop_path_rate, downsample, block)
        self.final = LayerNorm2d(dims[-1], eps=1e-5, **dd)
        self.make_head(dims[-1], global_pool, **dd)


BASE: dict[str, Any] = {"embed_dim": 96, "depths": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32)}
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {"depths": (3, 6, 29, 2)},
    "base": BASE,
    "base_384": {**BASE, "split_sizes": (96, 48, 12, 0)},
    # Ours, for tests and small data sets.
    "test": {
        "embed_dim": 16,
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 4, 4),
        "split_sizes": (24, 12, 4, 0),
        "mlp_ratio": 2.0,
    },
}

default_cfgs = generate_default_cfgs(
    {
        **{
            f"inline_cswin_{x}.in1k": inline_cfg(**pretrained_source(f"inline_cswin_{x}"))
            for x in ("tiny", "small", "base")
        },
        "inline_cswin_base_384.in1k": inline_cfg(384),
        "test_inline_cswin.untrained": inline_cfg(160),
    }
)


@register_model
def inline_cswin_tiny(pretrained: bool = False, **kwargs: Any) -> InLineCSwin:
    """InLine-CSwin-T: 20.6M parameters, 83.2% ImageNet-1K top-1 as published."""
    return build_model(
        InLineCSwin, "inline_cswin_tiny", pretrained, **{**VARIANTS["tiny"], **kwargs}
    )


@register_model
def inline_cswin_small(pretrained: bool = False, **kwargs: Any) -> InLineCSwin:
    """InLine-CSwin-S: 33.0M parameters, 83.8% ImageNet-1K top-1 as published."""
    return build_model(
        InLineCSwin, "inline_cswin_small", pretrained, **{**VARIANTS["small"], **kwargs}
    )


@register_model
def inline_cswin_base(pretrained: bool = False, **kwargs: Any) -> InLineCSwin:
    """InLine-CSwin-B: 73.4M parameters, 84.5% ImageNet-1K top-1 as published."""
    return build_model(
        InLineCSwin, "inline_cswin_base", pretrained, **{**VARIANTS["base"], **kwargs}
    )


@register_model
def inline_cswin_base_384(pretrained: bool = False, **kwargs: Any) -> InLineCSwin:
    """InLine-CSwin-B for images of 384 pixels: 73.4M parameters, 85.7% top-1 as published."""
    return build_model(
        InLineCSwin, "inline_cswin_base_384", pretrained, **{**VARIANTS["base_384"], **kwargs}
    )


@register_model
def test_inline_cswin(pretrained: bool = False, **kwargs: Any) -> InLineCSwin:
    """A small InLine-CSwin for tests and small data sets."""
    return build_model(
        InLineCSwin, "test_inline_cswin", pretrained, **{**VARIANTS["test"], **kwargs}
    )
