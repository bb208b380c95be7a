"""L2ViT: linear global attention and local window attention in turn.

`The Linear Attention Resurrection in Vision Transformer` (L2ViT)
- paper: https://arxiv.org/abs/2501.16182
- code and weights by the authors: https://github.com/ChuanyangZheng/L2ViT

Written from the definition. Blocks alternate within each stage: softmax inside windows, then linear
attention over the whole map followed by a local concentration module.

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
    CeilConv,
    ConvNormAct,
    LinearAttention,
    LocalConcentration,
    Mlp,
    PaddedWindowAttention,
    ResidualDepthwiseConv,
    check_images,
)
from vitlinear.layers.band import LOCAL

from ._build import build_model
from ._gradient_checkpointing import Block
from ._stages import StagedBackbone, four_each, map_cfg

__all__ = ["L2ViT"]

EPS = 1e-5  # of every norm, as released


class L2Stem(nn.Module):
    """Two 3x3 convolutions of stride 2 with batch norm, ReLU between them, then a layer norm."""

    row_rule = LOCAL

    def __init__(
        self,
        in_chans: int,
        dim: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.conv1 = ConvNormAct(in_chans, dim // 2, 3, stride=2, act=nn.ReLU(), **dd)
        self.conv2 = ConvNormAct(dim // 2, dim, 3, stride=2, **dd)
        self.norm = LayerNorm2d(dim, eps=EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> [B, dim, ceil(H/4), ceil(W/4)], channels_last.

        Raises:
            AssertionError: There is no batch axis, or another number of channels.
        """
        x = check_images(x, self.in_chans)
        return self.norm(self.conv2(self.conv1(x)))


class L2Downsample(nn.Module):
    """Layer norm, then a 2x2 convolution of stride 2 on the map padded with zeros to even sides."""

    row_rule = LOCAL

    def __init__(
        self,
        in_dim: int,
        dim: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = LayerNorm2d(in_dim, eps=EPS, **dd)
        self.conv = CeilConv(in_dim, dim, 2, stride=2, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C, ceil(H/2), ceil(W/2)]."""
        return self.conv(self.norm(x))


class L2WindowBlock(Block):
    """Window attention and feed-forward network, each after a positional convolution."""

    row_rule = LOCAL

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        window_size: int,
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
        self.attn = PaddedWindowAttention(dim, num_heads, window_size, proj_drop, backend, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.pos2 = ResidualDepthwiseConv(dim, 3, **dd)
        self.norm2 = LayerNorm(dim, eps=EPS, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = self.pos1(x)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        x = self.pos2(x)
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class L2LinearBlock(Block):
    """Positional convolution, linear attention, local concentration, feed-forward network."""

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
        self.attn = LinearAttention(
            dim, num_heads, "l2", temperature=True, proj_drop=proj_drop, backend=backend, **dd
        )
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm3 = LayerNorm(dim, eps=EPS, **dd)
        self.lcm = LocalConcentration(dim, **dd)
        self.drop_path3 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = LayerNorm(dim, eps=EPS, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = self.pos1(x)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        x = x + self.drop_path3(self.lcm(self.norm3(x)))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class L2ViT(StagedBackbone):
    """Backbone and classifier; takes images of any size, square or not.

    Temperatures have three axes in the released code, where weight decay reaches them; here they
    have one, and timm's rule exempts them.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        window_size: int = 7,
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
            depths: Blocks of each stage; those of even index have window attention.
            num_heads: Attention heads of each stage.
            mlp_ratio: Hidden width of the feed-forward networks over the channels.
            window_size: Side of the attention windows in tokens.
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
        four_each(embed_dims=embed_dims, depths=depths, num_heads=num_heads)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def downsample(i: int) -> nn.Module:
            return L2Downsample(embed_dims[i - 1], embed_dims[i], **dd)

        def block(i: int, j: int, drop_path: float) -> Block:
            dim, heads = embed_dims[i], num_heads[i]
            if j % 2:
                return L2LinearBlock(
                    dim, heads, mlp_ratio, proj_drop_rate, drop_path, attn_backend, **dd
                )
            return L2WindowBlock(
                dim, heads, mlp_ratio, window_size, proj_drop_rate, drop_path, attn_backend, **dd
            )

        self.stem = L2Stem(in_chans, embed_dims[0], **dd)
        self.make_stages(embed_dims, depths, drop_path_rate, downsample, block)
        self.final = LayerNorm2d(embed_dims[-1], eps=EPS, **dd)
        self.make_head(embed_dims[-1], global_pool, **dd)


# Source: released code, classification/models/l2vit.py.
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {
        "embed_dims": (96, 192, 384, 768),
        "depths": (2, 2, 6, 2),
        "num_heads": (3, 6, 12, 24),
    },
    "small": {
        "embed_dims": (96, 192, 384, 768),
        "depths": (2, 2, 18, 2),
        "num_heads": (3, 6, 12, 24),
    },
    "base": {
        "embed_dims": (128, 256, 512, 1024),
        "depths": (2, 2, 18, 2),
        "num_heads": (4, 8, 16, 32),
    },
    # Ours, for tests and small data sets.
    "test": {
        "embed_dims": (16, 32, 48, 64),
        "depths": (2, 2, 3, 2),
        "num_heads": (1, 2, 3, 4),
    },
}


def _cfg(side: int = 224, **kwargs: Any) -> dict[str, Any]:
    return map_cfg(
        side,
        first_conv="stem.conv1.conv",
        paper_ids="arXiv:2501.16182",
        paper_name="The Linear Attention Resurrection in Vision Transformer",
        origin_url="https://github.com/ChuanyangZheng/L2ViT",
        **kwargs,
    )


def _published(name: str, **kwargs: Any) -> dict[str, dict[str, Any]]:
    return {name: _cfg(**pretrained_source(name), **kwargs)}


# Evaluation at 384 as published: the whole image, squeezed into a square.
_AT_384 = {"side": 384, "crop_pct": 1.0, "crop_mode": "squash"}

default_cfgs = generate_default_cfgs(
    {
        **_published("l2vit_tiny.in1k"),
        **_published("l2vit_small.in1k"),
        **_published("l2vit_base.in1k"),
        **_published("l2vit_base.in22k_ft_in1k"),
        **_published("l2vit_base.in22k", num_classes=21841),
        **_published("l2vit_base_384.in22k_ft_in1k", **_AT_384),
        "test_l2vit.untrained": _cfg(160),
    }
)


@register_model
def l2vit_tiny(pretrained: bool = False, **kwargs: Any) -> L2ViT:
    """L2ViT-T: 28.6M parameters, 83.1% ImageNet-1K top-1 as published."""
    return build_model(L2ViT, "l2vit_tiny", pretrained, **{**VARIANTS["tiny"], **kwargs})


@register_model
def l2vit_small(pretrained: bool = False, **kwargs: Any) -> L2ViT:
    """L2ViT-S: 50.2M parameters, 84.1% ImageNet-1K top-1 as published."""
    return build_model(L2ViT, "l2vit_small", pretrained, **{**VARIANTS["small"], **kwargs})


@register_model
def l2vit_base(pretrained: bool = False, **kwargs: Any) -> L2ViT:
    """L2ViT-B: 88.6M parameters, 84.4% ImageNet-1K top-1 as published; 86.0% from ImageNet-22K."""
    return build_model(L2ViT, "l2vit_base", pretrained, **{**VARIANTS["base"], **kwargs})


@register_model
def l2vit_base_384(pretrained: bool = False, **kwargs: Any) -> L2ViT:
    """L2ViT-B at 384 with windows of 12: 87.0% ImageNet-1K top-1 as published."""
    model_args = {**VARIANTS["base"], "window_size": 12}
    return build_model(L2ViT, "l2vit_base_384", pretrained, **{**model_args, **kwargs})


@register_model
def test_l2vit(pretrained: bool = False, **kwargs: Any) -> L2ViT:
    """A small L2ViT for tests and small data sets."""
    return build_model(L2ViT, "test_l2vit", pretrained, **{**VARIANTS["test"], **kwargs})
