"""ViT³: vision transformers whose attention is a step of training on the tokens of the image.

`ViT³: Unlocking Test-Time Training in Vision` (CVPR 2026)
- paper: https://arxiv.org/abs/2512.01643
- code and weights by the authors: https://github.com/LeapLabTHU/ViTTT

Written from the definition: `ViTTT` has one resolution, `HViTTT` four stages. The released code of
the first takes square images alone, that of the second the size that it was built for; here both
take any.

No `from __future__ import annotations` in files of models: torch.fx copies the annotations of
`forward` into the code it generates, and TorchScript cannot read them there as strings.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitlinear.facts import pretrained_source
from vitlinear.layers import (
    ConvMlp,
    InvertedDownsample,
    InvertedStem,
    MapFullWidthRotaryTables,
    Mlp,
    ResidualDepthwiseConv,
    recomputes,
)
from vitlinear.layers.attention.ttt_attention import TttAttention
from vitlinear.layers.band import LOCAL
from vitlinear.layers.layout import known_strides, split_axis
from vitlinear.ops import RotaryTables

from ._build import build_model
from ._gradient_checkpointing import Block
from ._isotropic import IsotropicBackbone, TokenBlock, token_cfg
from ._stages import RotaryStage, Stage, StagedBackbone, four_each, map_cfg

__all__ = ["HViTTT", "ViTTT"]


class PositionedTokenBlock(TokenBlock):
    """Positional convolution on the grid, then attention and feed-forward network on maps."""

    row_rule = LOCAL

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp: nn.Module,
        norm_layer: Callable[..., nn.Module],
        drop_path: float,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the block; arguments as `TokenBlock`, but for attn, which takes [B, H, W, C]."""
        super().__init__(dim, attn, mlp, norm_layer, drop_path, device=device, dtype=dtype)
        self.pos = ResidualDepthwiseConv(dim, 3, device=device, dtype=dtype)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """[B, height * width, C] -> the same shape."""
        x = self.pos(split_axis(known_strides(x), 1, [height, width]))
        x = x + self.drop_path1(self.normed_attention(x))
        x = x + self.drop_path2(self.normed_mlp(x))
        return x.flatten(1, 2)

    @recomputes("norm1", "attn")
    def normed_attention(self, x: Tensor) -> Tensor:
        """attn(norm1(x)), of which backward makes the norm again."""
        return self.attn(self.norm1(x))

    @recomputes("norm2", "mlp")
    def normed_mlp(self, x: Tensor) -> Tensor:
        """mlp(norm2(x)), of which backward makes the norm again."""
        return self.mlp(self.norm2(x))


class ViTTT(IsotropicBackbone):
    """Backbone and classifier of one resolution; takes images of any size, square or not.

    There are no positions but those that convolutions see.
    """

    rounds_down = True
    default_convs = True

    def __init__(
        self,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the model.

        Args:
            patch_size: Side of a patch in pixels.
            in_chans: Channels of the image.
            num_classes: Classes; 0 leaves the classifier out.
            global_pool: ``'avg'``, ``'max'``, ``'avgmax'``, or ``''`` for the logits of every
                token.
            embed_dim: Channels.
            depth: Blocks.
            num_heads: Attention heads, besides the one of the convolution.
            mlp_ratio: Hidden width of the feed-forward networks over the channels.
            drop_rate: Dropout rate before the classifier.
            pos_drop_rate: Dropout rate of the tokens before the first block.
            proj_drop_rate: Dropout rate of the output of attentions and feed-forward networks.
            drop_path_rate: Stochastic depth rate of the last block, growing linearly from 0.
            attn_backend: One of `vitlinear.ops.BACKENDS`.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: A number is too small, or the channels do not divide into heads.
            AssertionError: The pooling is not supported.
        """
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            None,
            patch_size,
            in_chans,
            num_classes,
            global_pool,
            embed_dim,
            depth,
            class_token=False,
            learned_positions=False,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            **dd,
        )

        def attn() -> nn.Module:
            return TttAttention(embed_dim, num_heads, proj_drop_rate, attn_backend, **dd)

        def mlp() -> nn.Module:
            return Mlp(embed_dim, int(embed_dim * mlp_ratio), proj_drop_rate, **dd)

        norm = partial(LayerNorm, eps=1e-6)
        self.make_blocks(attn, mlp, norm, drop_path_rate, PositionedTokenBlock, **dd)


class HViTTTBlock(Block):
    """Positional convolution, attention and feed-forward network, each with its residual."""

    row_rule = LOCAL

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        proj_drop: float,
        drop_path: float,
        backend: str,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pos = ResidualDepthwiseConv(dim, 3, **dd)
        self.norm1 = LayerNorm(dim, eps=1e-5, **dd)
        self.attn = TttAttention(dim, num_heads, proj_drop, backend, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = LayerNorm(dim, eps=1e-5, **dd)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), proj_drop, second_act=True, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, rotary: RotaryTables) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = self.pos(x)
        x = x + self.drop_path1(self.normed_attention(x, rotary))
        x = x + self.drop_path2(self.normed_mlp(x))
        return x

    @recomputes("norm1", "attn")
    def normed_attention(self, x: Tensor, rotary: RotaryTables) -> Tensor:
        """attn(norm1(x)), of which backward makes the norm again."""
        return self.attn(self.norm1(x), rotary)

    @recomputes("norm2", "mlp")
    def normed_mlp(self, x: Tensor) -> Tensor:
        """mlp(norm2(x)), of which backward makes the norm again."""
        return self.mlp(self.norm2(x))


class HViTTT(StagedBackbone):
    """Backbone of four stages and classifier; takes images of any size, square or not.

    Queries and keys have full-width rotary positions, unlike in `ViTTT`.
    """

    default_convs = True

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (1, 3, 9, 4),
        num_heads: Sequence[int] = (2, 4, 10, 16),
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
            embed_dims: Channels of each stage.
            depths: Blocks of each stage.
            num_heads: Attention heads of each stage, besides the one of the convolution.
            mlp_ratio: Hidden width of the feed-forward networks over the channels.
            drop_rate: Dropout rate before the classifier.
            proj_drop_rate: Dropout rate of the output of attentions and feed-forward networks.
            drop_path_rate: Stochastic depth rate of the last block, growing linearly from 0.
            attn_backend: One of `vitlinear.ops.BACKENDS`.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: The per-stage settings are not four each, or do not fit together.
            AssertionError: The pooling is not supported.
        """
        super().__init__(in_chans, num_classes, global_pool, drop_rate)
        four_each(embed_dims=embed_dims, depths=depths, num_heads=num_heads)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def downsample(i: int) -> nn.Module:
            return InvertedDownsample(embed_dims[i - 1], embed_dims[i], **dd)

        def block(i: int, j: int, drop_path: float) -> Block:
            dim, heads = embed_dims[i], num_heads[i]
            return HViTTTBlock(dim, heads, mlp_ratio, proj_drop_rate, drop_path, attn_backend, **dd)

        def stage(i: int, downsample: nn.Module, blocks: list[Block]) -> Stage:
            return RotaryStage(downsample, blocks, MapFullWidthRotaryTables())

        self.stem = InvertedStem(in_chans, embed_dims[0], residual=False, **dd)
        self.make_stages(embed_dims, depths, drop_path_rate, downsample, block, stage)
        self.final = nn.BatchNorm2d(embed_dims[-1], **dd)
        self.make_head(embed_dims[-1], global_pool, **dd)


# Source: released code, vittt/models/, and cfgs/.
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "num_heads": 6},
    "small": {"embed_dim": 384, "num_heads": 6},
    "base": {"embed_dim": 768, "num_heads": 12},
    # Ours, for tests and small data sets.
    "test": {"embed_dim": 48, "num_heads": 3, "depth": 4},
    "h_tiny": {
        "embed_dims": (64, 128, 320, 512),
        "depths": (1, 3, 9, 4),
        "num_heads": (2, 4, 10, 16),
    },
    "h_small": {
        "embed_dims": (64, 128, 320, 512),
        "depths": (2, 6, 18, 8),
        "num_heads": (2, 4, 10, 16),
    },
    "h_base": {
        "embed_dims": (96, 192, 448, 640),
        "depths": (2, 6, 18, 8),
        "num_heads": (3, 6, 14, 20),
    },
    "h_test": {
        "embed_dims": (24, 32, 48, 64),
        "depths": (1, 1, 2, 1),
        "num_heads": (3, 2, 2, 4),
    },
}

# Of all. The means in the authors' files of models are left over: their evaluation has ImageNet's.
_PAPER = {
    "paper_ids": "arXiv:2512.01643",
    "paper_name": "ViT³: Unlocking Test-Time Training in Vision",
    "origin_url": "https://github.com/LeapLabTHU/ViTTT",
}


def _map_cfg(side: int = 224, **kwargs: Any) -> dict[str, Any]:
    return map_cfg(side, first_conv="stem.conv1.conv", **_PAPER, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        **{
            f"vittt_{size}.in1k": token_cfg(**_PAPER, **pretrained_source(f"vittt_{size}"))
            for size in ("tiny", "small", "base")
        },
        **{
            f"h_vittt_{size}.in1k": _map_cfg(**pretrained_source(f"h_vittt_{size}"))
            for size in ("tiny", "small", "base")
        },
        "test_vittt.untrained": token_cfg(96, **_PAPER),
        "test_h_vittt.untrained": _map_cfg(160),
    }
)


@register_model
def vittt_tiny(pretrained: bool = False, **kwargs: Any) -> ViTTT:
    """ViT³-T: 6.1M parameters, 76.5% ImageNet-1K top-1 as published."""
    return build_model(ViTTT, "vittt_tiny", pretrained, **{**VARIANTS["tiny"], **kwargs})


@register_model
def vittt_small(pretrained: bool = False, **kwargs: Any) -> ViTTT:
    """ViT³-S: 23.8M parameters, 81.6% ImageNet-1K top-1 as published."""
    return build_model(ViTTT, "vittt_small", pretrained, **{**VARIANTS["small"], **kwargs})


@register_model
def vittt_base(pretrained: bool = False, **kwargs: Any) -> ViTTT:
    """ViT³-B: 90.1M parameters, 82.6% ImageNet-1K top-1 as published."""
    return build_model(ViTTT, "vittt_base", pretrained, **{**VARIANTS["base"], **kwargs})


@register_model
def h_vittt_tiny(pretrained: bool = False, **kwargs: Any) -> HViTTT:
    """H-ViT³-T: 28.7M parameters, 84.0% ImageNet-1K top-1 as published, trained with MESA."""
    return build_model(HViTTT, "h_vittt_tiny", pretrained, **{**VARIANTS["h_tiny"], **kwargs})


@register_model
def h_vittt_small(pretrained: bool = False, **kwargs: Any) -> HViTTT:
    """H-ViT³-S: 54.4M parameters, 84.9% ImageNet-1K top-1 as published, trained with MESA."""
    return build_model(HViTTT, "h_vittt_small", pretrained, **{**VARIANTS["h_small"], **kwargs})


@register_model
def h_vittt_base(pretrained: bool = False, **kwargs: Any) -> HViTTT:
    """H-ViT³-B: 94.4M parameters, 85.5% ImageNet-1K top-1 as published, trained with MESA."""
    return build_model(HViTTT, "h_vittt_base", pretrained, **{**VARIANTS["h_base"], **kwargs})


@register_model
def test_vittt(pretrained: bool = False, **kwargs: Any) -> ViTTT:
    """A small ViT³ for tests and small data sets."""
    return build_model(ViTTT, "test_vittt", pretrained, **{**VARIANTS["test"], **kwargs})


@register_model
def test_h_vittt(pretrained: bool = False, **kwargs: Any) -> HViTTT:
    """A small H-ViT³ for tests and small data sets."""
    return build_model(HViTTT, "test_h_vittt", pretrained, **{**VARIANTS["h_test"], **kwargs})
