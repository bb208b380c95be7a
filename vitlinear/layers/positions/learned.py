"""Learned positions, resized to the map that they are added to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module

from ..layout import is_followed
from ..padding_rule import SIZES
from ..windows import join_maps


def resizing(length: int, size: int, x: Tensor) -> Tensor:
    """Bicubic resizing of an axis with antialiasing, as a matrix [size, length].

    The kernel is Keys' with a = -1/2, as wide as places of the result are apart.

    Args:
        length: Places given.
        size: Places wanted.
        x: What tells type and device.
    """
    places = torch.arange(length, dtype=x.dtype, device=x.device) + 0.5
    step = torch.ones_like(places).sum() / size  # a tensor, whichever of the two is one
    centres = (torch.arange(size, dtype=x.dtype, device=x.device) + 0.5) * step
    d = (places - centres[:, None]).abs() / step.clamp(min=1)
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((2.5 - 0.5 * d) * d - 4) * d + 2
    weights = torch.where(d < 1, near, torch.where(d < 2, far, 0))
    return weights / weights.sum(1, keepdim=True)


def resized_by_products(x: Tensor, height: int, width: int) -> Tensor:
    """`F.interpolate`, bicubic with antialiasing, in steps that the older exporter to ONNX has.

    Args:
        x: [rows, cols, C].
        height: Wanted.
        width: Wanted.

    Returns:
        [height, width, C].
    """
    rows, cols = x.shape[:2]
    down = resizing(rows, height, x) @ x.flatten(1)
    return resizing(cols, width, x) @ down.unflatten(1, [cols, x.shape[2]])


def resized_positions(
    positions: Tensor, grid_size: tuple[int, int], height: int, width: int, mode: str
) -> Tensor:
    """Positions of a map, resized without antialiasing to a map of this size.

    Args:
        positions: [1, rows * columns, C].
        grid_size: Rows and columns.
        height: Wanted.
        width: Wanted.
        mode: ``'bilinear'`` or ``'bicubic'``.

    Returns:
        [1, height, width, C]; as learned if they fit.
    """
    rows, cols = grid_size
    pos = positions.reshape(1, rows, cols, -1).permute(0, 3, 1, 2)
    if torch.jit.is_scripting():
        known = height == rows and width == cols
    else:
        # To compare them would tie an exported program to the size it was made with; to resize
        # them to their own size changes nothing. Resized with channels last, the strides of
        # half-precision ones would tie it to some sizes, too.
        compiling = torch.compiler.is_compiling() or is_followed(height)
        known = not compiling and (height, width) == (rows, cols)
        if compiling:
            pos = pos.contiguous()
    if not known:
        pos = F.interpolate(pos, size=[height, width], mode=mode, align_corners=False)
    return pos.permute(0, 2, 3, 1)


# One step to torch.fx, which cannot follow choices that look at shapes.
@register_notrace_module
class AddTokenPositions(nn.Module):
    """Adds learned positions, which belong to the model, to a row of tokens."""

    padding_rule = SIZES

    def __init__(self, num_prefix_tokens: int) -> None:
        """Note how many tokens stand before those of the map; they have positions too."""
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens

    def forward(
        self,
        x: Tensor,
        height: int,
        width: int,
        pos_embed: Tensor,
        grid_size: tuple[int, int],
        valid_sizes: list[tuple[int, int]] | None = None,
    ) -> Tensor:
        """Add.

        Args:
            x: Tokens, [B, num_prefix_tokens + height * width, C].
            height: Of the map.
            width: Of the map.
            pos_embed: Positions, [1, num_prefix_tokens + rows * columns, C].
            grid_size: Rows and columns of the positions.
            valid_sizes: Height and width of the part of each map that is no padding: positions
                are resized to it.

        Returns:
            In the shape of x.
        """
        if valid_sizes is None:
            return x + self.resized(pos_embed, grid_size, height, width)
        prefix = self.num_prefix_tokens
        maps: list[Tensor] = []
        for rows, cols in valid_sizes:
            positions = self.resized(pos_embed, grid_size, rows, cols)[:, prefix:]
            maps.append(positions.unflatten(1, [rows, cols]))
        before = pos_embed[:, :prefix].expand(x.shape[0], -1, -1)
        return x + torch.cat((before, join_maps(maps, height, width).flatten(1, 2)), dim=1)

    def resized(
        self, pos_embed: Tensor, grid_size: tuple[int, int], height: int, width: int
    ) -> Tensor:
        """The positions of a map of this size, [1, num_prefix_tokens + height * width, C].

        Bicubic with antialiasing, as timm resizes positions.
        """
        # Two conditions, for TorchScript to leave out what it cannot read.
        if not torch.jit.is_scripting():  # noqa: SIM102
            if is_followed(height):
                before, tokens = pos_embed.tensor_split([self.num_prefix_tokens], 1)
                tokens = tokens.float().reshape(*grid_size, -1)
                tokens = resized_by_products(tokens, height, width).flatten(0, 1)[None]
                return torch.cat((before, tokens.to(before.dtype)), 1)
        return resample_abs_pos_embed(
            pos_embed,
            new_size=[height, width],
            old_size=[grid_size[0], grid_size[1]],
            num_prefix_tokens=self.num_prefix_tokens,
        )


# One step to torch.fx, as above.
@register_notrace_module
class AddMapPositions(nn.Module):
    """Adds learned positions, which belong to the model, to a map."""

    padding_rule = SIZES

    def forward(
        self,
        x: Tensor,
        pos_embed: Tensor,
        grid_size: tuple[int, int],
        valid_sizes: list[tuple[int, int]] | None = None,
    ) -> Tensor:
        """Add.

        Args:
            x: Map, [B, H, W, C].
            pos_embed: Positions, [1, rows * columns, C].
            grid_size: Rows and columns of the positions.
            valid_sizes: Height and width of the part of each map that is no padding: positions
                are resized to it.

        Returns:
            In the shape of x.
        """
        if valid_sizes is None:
            return x + self.resized(pos_embed, grid_size, x.shape[1], x.shape[2])
        maps: list[Tensor] = []
        for height, width in valid_sizes:
            maps.append(self.resized(pos_embed, grid_size, height, width))
        return x + join_maps(maps, x.shape[1], x.shape[2])

    def resized(
        self, pos_embed: Tensor, grid_size: tuple[int, int], height: int, width: int
    ) -> Tensor:
        """The positions of a map of this size, [1, height, width, C]; as learned if it fits.

        Bilinear, as the released InLine-PVT does it.
        """
        return resized_positions(pos_embed, grid_size, height, width, "bilinear")
