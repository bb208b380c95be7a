"""PolaFormer's attention on maps [B, C, H, W]: halves of the values as products of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlinear.layers.attention.pola_attention import PolaAttention, PolarityAttention
from vitlinear.layers.positions.learned import resized_positions
from vitlinear.layers.windows import square_windows
from vitlinear.ops.mechanisms import MIXER_ROWS

from .attention import Slots, heads_of
from .formula import Parts, linear_attention, split_signs
from .layers import MapSize, NoForm, convolution, linear, pointwise, require, require_nothing
from .windows import Windows


class ChannelsFirstPolaAttention(nn.Module):
    """`PolaAttention` on a map [B, C, H, W].

    The first half of the values of a head is read by the features of q, the second by those of -q.
    Each has products, gate and local term of its own: no map is split or joined.
    """

    def __init__(self, attn: nn.Module, norm: nn.Module, size: MapSize | None) -> None:
        """Take the parameters over.

        Args:
            attn: The layer, fused.
            norm: The norm before it, whose weight and bias become part of the products.
            size: Of the map; None where it varies, and positions are resized in the program.

        Raises:
            NoForm: There are windows that depend on the size of the map, or the scale is not part
                of the projection.
        """
        super().__init__()
        require(attn, PolaAttention)
        assert isinstance(attn, PolaAttention)
        require(attn.attend, PolarityAttention)
        require_nothing(attn.proj_drop)
        self.windows: Windows | None = None
        products_norm: nn.Module | None = norm
        grid = None if size is None else (size.height, size.width)
        if attn.window_size > 0:
            if size is None:
                raise NoForm("PolaAttention in windows at any size")
            sides = (size.height, size.width)
            rows, cols, shift = square_windows(*sides, attn.window_size, attn.shift)
            self.windows = Windows(size, rows, cols, norm, shift, shift)
            products_norm = self.windows.norm_of_products(norm)
            grid = (rows[1], cols[1])
        if attn.scale is not None:
            raise NoForm("PolaAttention with a scale of its own")
        inner = attn.attend
        heads, width = inner.num_heads, inner.head_dim
        self.num_heads = heads
        slots = Slots(attn.qkvg, 4, heads, products_norm)
        self.q, self.k = slots.rows(0), slots.rows(1)
        halves = (slice(width // 2), slice(width // 2, None))
        self.values = nn.ModuleList(slots.rows(2, half) for half in halves)
        self.gates = nn.ModuleList(slots.rows(3, half) for half in halves)
        self.lepes, self.projs = nn.ModuleList(), nn.ModuleList()
        columns = linear(attn.proj).weight[:, :, 0, 0].detach().unflatten(1, (heads, width))
        for half, bias in zip(halves, (attn.proj.bias, None), strict=True):
            self.lepes.append(_some_channels(convolution(inner.lepe), heads, half))
            self.projs.append(pointwise(columns[:, :, half].flatten(1), bias))
        self.powers = nn.Parameter(inner.powers().detach().unsqueeze(2))
        self.grid_size = attn.grid_size
        self.positional_encoding = attn.positional_encoding
        positions = None
        if grid is not None:
            positions = attn.positions(*grid).detach().permute(0, 3, 1, 2).contiguous()
        self.register_buffer("positions", positions)

    def features(self, x: Tensor) -> Parts:
        """Powers of what is positive, and of what is negative, [B, h, D, N]."""
        positive, negative = split_signs(x)
        return positive**self.powers, negative**self.powers

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; x without what its norm multiplies and adds."""
        windows, tokens = self.windows, None
        if windows is not None:
            x = windows.of_map(x)
            tokens = windows.tokens_of(x)
        positions = self.positions
        if positions is None:
            learned, (height, width) = self.positional_encoding, x.shape[2:]
            learned = resized_positions(learned, self.grid_size, height, width, "bicubic")
            positions = learned.permute(0, 3, 1, 2)
        keys = self.k(x) + positions
        if windows is not None:
            keys = windows.without_padding(keys)
        q, k = (self.features(heads_of(y, self.num_heads)) for y in (self.q(x), keys))
        out: Tensor | None = None
        for i, reader in enumerate((q, q[::-1])):
            values = self.values[i](x)
            if windows is not None:
                values = windows.without_padding(values)
            v = heads_of(values, self.num_heads)
            read = linear_attention(reader, k, v, MIXER_ROWS["features"], None, tokens=tokens)
            read = (read.reshape(values.shape) + self.lepes[i](values)) * self.gates[i](x)
            out = self.projs[i](read) if out is None else out + self.projs[i](read)
        assert out is not None
        return out if windows is None else windows.to_map(out)


def _some_channels(conv: nn.Module, num_heads: int, channels: slice) -> nn.Conv2d:
    """A depthwise convolution of some channels of each head."""
    assert isinstance(conv, nn.Conv2d)

    def some(parameter: Tensor) -> Tensor:
        return parameter.unflatten(0, (num_heads, -1))[:, channels].flatten(0, 1)

    weight = some(conv.weight)
    made = nn.Conv2d(
        len(weight), len(weight), conv.kernel_size, padding=conv.padding, groups=len(weight),
        bias=conv.bias is not None, dtype=weight.dtype,
    )  # fmt: skip
    with torch.no_grad():
        made.weight.copy_(weight)
        if conv.bias is not None:
            assert made.bias is not None
            made.bias.copy_(some(conv.bias))
    return made.eval()
