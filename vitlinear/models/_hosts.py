"""Parts of hosts: PVT, Swin and CSwin, whose softmax attention families replace by their own.

Written from the definitions of the hosts (arXiv:2102.12122, arXiv:2103.14030, arXiv:2107.00652).

No `from __future__ import annotations` in files of models: torch.fx copies the annotations of
`forward` into the code it generates, and TorchScript cannot read them there as strings.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, LayerNorm2d, to_2tuple
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module
from vitlinear.layers import AddMapPositions, CeilConv, Linear, Mlp, check_images
from vitlinear.layers.band import LOCAL
from vitlinear.layers.init_normal import init_normal_
from vitlinear.layers.padding_rule import ZEROS_CHANNELS_FIRST

from ._gradient_checkpointing import Block


class HostBlock(Block):
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


# One step to torch.fx, which cannot follow choices that look at shapes.
@register_notrace_module
class PositionedPatchEmbed(nn.Module):
    """Convolution of patches, layer norm, learned positions resized to the map."""

    row_rule = LOCAL

    def __init__(
        self,
        in_dim: int,
        dim: int,
        patch_size: int,
        grid_size: tuple[int, int],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch_size = patch_size
        self.grid_size = grid_size
        self.conv = nn.Conv2d(in_dim, dim, patch_size, patch_size, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, grid_size[0] * grid_size[1], dim, **dd))
        self.add_positions = AddMapPositions()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal positions."""
        init_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Embed patches.

        Args:
            x: Images or a map, [B, in_dim, H, W]; channels are checked.

        Returns:
            [B, dim, H', W'] with H' = floor(H / patch_size), but at least 1: as released, an
            incomplete patch at the end of a side is left out.

        Raises:
            AssertionError: There is no batch axis, or another number of channels.
        """
        x = check_images(x, self.conv.in_channels)
        H, W, side = x.shape[2], x.shape[3], self.patch_size
        if side > H or side > W:
            x = F.pad(x, [0, max(side - W, 0), 0, max(side - H, 0)])
        x = self.norm(self.conv(x)).permute(0, 2, 3, 1)
        return self.add_positions(x, self.pos_embed, self.grid_size).permute(0, 3, 1, 2)


def pvt_grid_size(img_size: int | tuple[int, int], stage: int) -> tuple[int, int]:
    """Rows and columns of the map of a stage of PVT, for images of a size; 1 at least."""
    side = 4 * 2**stage
    height, width = to_2tuple(img_size)
    return max(height // side, 1), max(width // side, 1)


def pvt_patch_embed(
    stage: int,
    img_size: int | tuple[int, int],
    in_chans: int,
    embed_dims: Sequence[int],
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> PositionedPatchEmbed:
    """Make the patches that a stage of PVT begins with; those of the first one are of the image."""
    return PositionedPatchEmbed(
        in_chans if stage == 0 else embed_dims[stage - 1],
        embed_dims[stage],
        patch_size=4 if stage == 0 else 2,
        grid_size=pvt_grid_size(img_size, stage),
        device=device,
        dtype=dtype,
    )


class MapMerging(nn.Module):
    """Four neighbours in one token, layer norm, projection to half of their channels.

    timm has this layer; its padding, by the rest of a division, ties an exported program to odd or
    to even maps.
    """

    row_rule = LOCAL
    row_conv = (2, 2, 0)  # to rows it is a convolution: kernel, stride, padding
    padding_rule = ZEROS_CHANNELS_FIRST

    def __init__(
        self, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = LayerNorm(4 * dim, eps=1e-5, **dd)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 2 C, ceil(H / 2), ceil(W / 2)], zeros beyond an odd side."""
        H, W = x.shape[2], x.shape[3]
        x = F.pad(x.permute(0, 2, 3, 1), [0, 0, 0, 1, 0, 1])
        neighbours = [
            x[:, :H:2, :W:2],
            x[:, 1::2, :W:2],
            x[:, :H:2, 1::2],
            x[:, 1::2, 1::2],
        ]
        return self.reduction(self.norm(torch.cat(neighbours, -1))).permute(0, 3, 1, 2)
