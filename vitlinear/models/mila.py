"""MILA: Mamba-inspired linear attention, first published as MLLA.

`Demystify Mamba in Vision: A Linear Attention Perspective` (MILA, NeurIPS 2024)
- paper: https://arxiv.org/abs/2405.16605
- code and weights by the authors: https://github.com/LeapLabTHU/MLLA

Written from the definition. Every block has the shape of Mamba's, with linear attention in the
place of the selective state space model, and a feed-forward network after it.

No `from __future__ import annotations` in files of models: torch.fx copies the annotations of
`forward` into the code it generates, and TorchScript cannot read them there as strings.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, LayerNorm2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitlinear.facts import pretrained_source
from vitlinear.layers import (
    InvertedDownsample,
    InvertedStem,
    MapFullWidthRotaryTables,
    MilaAttention,
    Mlp,
    ResidualDepthwiseConv,
    recomputes,
)
from vitlinear.layers.band import LOCAL
from vitlinear.ops import RotaryTables

from ._build import build_model
from ._gradient_checkpointing import Block
from ._stages import RotaryStage, Stage, StagedBackbone, four_each, map_cfg

__all__ = ["MILA"]

EPS = 1e-5  # of every norm, as released


class MilaBlock(Block):
    """Attention and feed-forward network, each after a positional convolution and a norm."""

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
        self.pos1 = ResidualDepthwiseConv(dim, 3, **dd)
        self.norm1 = LayerNorm(dim, eps=EPS, **dd)
        self.attn = MilaAttention(dim, num_heads, proj_drop, backend, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.pos2 = ResidualDepthwiseConv(dim, 3, **dd)
        self.norm2 = LayerNorm(dim, eps=EPS, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, rotary: RotaryTables) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = self.pos1(x)
        x = self.pos2(x + self.drop_path1(self.normed_attention(x, rotary)))
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


class MILA(StagedBackbone):
    """Backbone and classifier; takes images of any size, square or not."""

    default_convs = True

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 4, 8, 4),
        num_heads: Sequence[int] = (2, 4, 8, 16),
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
            num_heads: Attention heads of each stage.
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
            return MilaBlock(dim, heads, mlp_ratio, proj_drop_rate, drop_path, attn_backend, **dd)

        def stage(i: int, downsample: nn.Module, blocks: list[Block]) -> Stage:
            return RotaryStage(downsample, blocks, MapFullWidthRotaryTables())

        self.stem = InvertedStem(in_chans, embed_dims[0], residual=True, **dd)
        self.make_stages(embed_dims, depths, drop_path_rate, downsample, block, stage)
        self.final = LayerNorm2d(embed_dims[-1], eps=EPS, **dd)
        self.make_head(embed_dims[-1], global_pool, **dd)


# Source: released configurations, cfgs/mlla_{t,s,b}.yaml.
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {
        "embed_dims": (64, 128, 256, 512),
        "depths": (2, 4, 8, 4),
        "num_heads": (2, 4, 8, 16),
    },
    "small": {
        "embed_dims": (64, 128, 256, 512),
        "depths": (3, 6, 21, 6),
        "num_heads": (2, 4, 8, 16),
    },
    "base": {
        "embed_dims": (96, 192, 384, 768),
        "depths": (3, 6, 21, 6),
        "num_heads": (3, 6, 12, 24),
    },
    # Ours, for tests and small data sets.
    "test": {
        "embed_dims": (24, 32, 48, 64),
        "depths": (1, 1, 2, 1),
        "num_heads": (3, 2, 2, 4),
    },
}


def _cfg(side: int = 224, **kwargs: Any) -> dict[str, Any]:
    return map_cfg(
        side,
        first_conv="stem.conv1.conv",
        paper_ids="arXiv:2405.16605",
        paper_name="Demystify Mamba in Vision: A Linear Attention Perspective",
        origin_url="https://github.com/LeapLabTHU/MLLA",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        **{
            f"mila_{size}.in1k": _cfg(**pretrained_source(f"mila_{size}"))
            for size in ("tiny", "small", "base")
        },
        "test_mila.untrained": _cfg(160),
    }
)


@register_model
def mila_tiny(pretrained: bool = False, **kwargs: Any) -> MILA:
    """MILA-T (MLLA-T): 24.4M parameters, 83.5% ImageNet-1K top-1 as published."""
    return build_model(MILA, "mila_tiny", pretrained, **{**VARIANTS["tiny"], **kwargs})


@register_model
def mila_small(pretrained: bool = False, **kwargs: Any) -> MILA:
    """MILA-S (MLLA-S): 43.0M parameters, 84.4% ImageNet-1K top-1 as published."""
    return build_model(MILA, "mila_small", pretrained, **{**VARIANTS["small"], **kwargs})


@register_model
def mila_base(pretrained: bool = False, **kwargs: Any) -> MILA:
    """MILA-B (MLLA-B): 96.0M parameters, 85.3% ImageNet-1K top-1 as published."""
    return build_model(MILA, "mila_base", pretrained, **{**VARIANTS["base"], **kwargs})


@register_model
def test_mila(pretrained: bool = False, **kwargs: Any) -> MILA:
    """A small MILA for tests and small data sets."""
    return build_model(MILA, "test_mila", pretrained, **{**VARIANTS["test"], **kwargs})
