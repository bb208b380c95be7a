"""Parts that the hosts of InLine attention share: blocks, and the way down between stages.

InLine (`Bridging the Divide: Reconsidering Softmax and Linear Attention`, NeurIPS 2024)
- paper: https://arxiv.org/abs/2412.06590
- code and weights by the authors: https://github.com/LeapLabTHU/InLine

No `from __future__ import annotations` in files of models: torch.fx copies the annotations of
`forward` into the code it generates, and TorchScript cannot read them there as strings.
"""

from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, LayerNorm2d
from torch import Tensor, nn

from vitlinear.layers import CeilConv, Mlp, check_images
from vitlinear.layers.band import LOCAL

from ._gradient_checkpointing import Block
from ._stages import map_cfg


class InLineBlock(Block):
    """Attention and feed-forward network, each after a norm and with its residual."""

    row_rule = LOCAL

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        eps: float,
        proj_drop: float,
        drop_path: float,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, eps=eps, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = LayerNorm(dim, eps=eps, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class ConvNorm(nn.Module):
    """Strided convolution and layer norm; a side of n becomes ceil(n / stride)."""

    row_rule = LOCAL

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int,
        stride: int,
        padding: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = CeilConv(in_dim, dim, kernel_size, stride, padding, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C, ceil(H / stride), ceil(W / stride)]."""
        return self.norm(self.conv(x))


class ImageConvNorm(ConvNorm):
    """The same on images, which it checks."""

    row_rule = LOCAL

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> map [B, C, ceil(H / stride), ceil(W / stride)].

        Raises:
            AssertionError: There is no batch axis, or another number of channels.
        """
        x = check_images(x, self.conv.in_channels)
        return self.norm(self.conv(x))


# Of every host; evaluation squeezes images into a square before the crop, as published.
INLINE = {
    "crop_mode": "squash",
    "paper_ids": "arXiv:2412.06590",
    "paper_name": "Bridging the Divide: Reconsidering Softmax and Linear Attention",
    "origin_url": "https://github.com/LeapLabTHU/InLine",
}


def inline_cfg(side: int = 224, **kwargs: Any) -> dict[str, Any]:
    """A ``pretrained_cfg`` of a host of four stages, for square images of this side."""
    return map_cfg(side, first_conv="stem.conv", **INLINE, **kwargs)
