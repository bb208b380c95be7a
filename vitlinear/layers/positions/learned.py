"""Learned positions, resized to the map that they are added to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module

from ..band import BANDED, Band, band_in_use
from ..layout import is_followed
from ..padding_rule import SIZES
from ..windows import join_maps, varies


def needs_products(positions: Tensor, height: int, width: int) -> bool:
    """Whether a program for any size is made that has no other way to resize these positions.

    The older exporter to ONNX has no antialiasing. In compiled programs for any size, PyTorch's own
    gradient of it fails: "Expected IntList but got GenericList".
    """
    if is_followed(height):
        return True
    wanted = torch.is_grad_enabled() and positions.requires_grad
    return wanted and (varies(height) or varies(width))


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
    row_rule = BANDED

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
            if not torch.jit.is_scripting():
                band = band_in_use()
                if band is not None:
                    return x + self.resized_band(band, pos_embed, grid_size, height, width)
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
            if needs_products(pos_embed, height, width):
                before, tokens = pos_embed.tensor_split([self.num_prefix_tokens], 1)
                tokens = tokens.float().reshape(*grid_size, -1)
                tokens = resized_by_products(tokens, height, width).flatten(0, 1)[None]
                return torch.cat((before, tokens.to(before.dtype)), 1)
        if pos_embed.dtype == torch.float64:  # of which timm would make float32
            before, tokens = pos_embed.tensor_split([self.num_prefix_tokens], 1)
            tokens = tokens.reshape(1, grid_size[0], grid_size[1], -1).permute(0, 3, 1, 2)
            size = [height, width]
            if height != grid_size[0] or width != grid_size[1]:
                tokens = F.interpolate(
                    tokens, size=size, mode="bicubic", align_corners=False, antialias=True
                )
            return torch.cat((before, tokens.permute(0, 2, 3, 1).flatten(1, 2)), 1)
        return resample_abs_pos_embed(
            pos_embed,
            new_size=[height, width],
            old_size=[grid_size[0], grid_size[1]],
            num_prefix_tokens=self.num_prefix_tokens,
        )

    @torch.jit.ignore
    def resized_band(
        self,
        band: Band,
        pos_embed: Tensor,
        grid_size: tuple[int, int],
        height: int,
        width: int,
    ) -> Tensor:
        """`resized` for the rows of a band, and for the tokens before them."""
        band.check_rows(height)
        # In float32 whatever the type: no other way than to resize the whole map gives its digits.
        whole = band.once(self, lambda: self.resized(pos_embed, grid_size, band.height, width))
        before, tokens = whole.tensor_split([self.num_prefix_tokens], 1)
        rows = tokens.unflatten(1, [band.height, width])[:, band.start : band.stop]
        return torch.cat((before, rows.flatten(1, 2)), 1)


# One step to torch.fx, as above.
@register_notrace_module
class AddMapPositions(nn.Module):
    """Adds learned positions, which belong to the model, to a map."""

    padding_rule = SIZES
    row_rule = BANDED

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
            if not torch.jit.is_scripting():
                band = band_in_use()
                if band is not None:
                    return x + self.resized_band(band, pos_embed, grid_size, x.shape[2])
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

    @torch.jit.ignore
    def resized_band(
        self, band: Band, pos_embed: Tensor, grid_size: tuple[int, int], width: int
    ) -> Tensor:
        """`resized` for the rows of a band, [1, rows, width, C]."""
        rows, cols = grid_size
        pos = pos_embed.reshape(1, rows, cols, -1)
        # Places of the band in rows of the grid, as `F.interpolate` counts them.
        place = torch.arange(band.start, band.stop, device=pos.device, dtype=pos.dtype)
        place = ((place + 0.5) * (rows / band.height) - 0.5).clamp(min=0)
        above = place.long().clamp(max=rows - 1)
        share = (place - above).to(pos.dtype)[:, None, None]
        pos = pos[:, above] * (1 - share) + pos[:, (above + 1).clamp(max=rows - 1)] * share
        if width == cols:
            return pos
        pos = pos.permute(0, 3, 1, 2)
        size = [pos.shape[2], width]
        pos = F.interpolate(pos, size=size, mode="bilinear", align_corners=False)
        return pos.permute(0, 2, 3, 1)
