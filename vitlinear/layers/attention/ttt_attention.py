"""Attention of ViT³: two small networks that take a step of training on the tokens of the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module
from vitlinear.ops import RotaryTables, accumulation_dtype
from vitlinear.ops.backend import check_backend
from vitlinear.ops.inner_step import gated, inner_values, stepped

from ..band import BANDED, Band, band_in_use
from ..conv.dynamic_conv import conv_per_sample
from ..heads import split_heads
from ..init_normal import init_normal_
from ..layout import split_axis
from ..linear import Linear
from ..padding_rule import MASK
from .band_attention import merge_sums
from .scriptable import unpack
from .scriptable_state import scriptable_read, scriptable_state, turned


# One step to torch.fx, as `GatedAttention`.
@register_notrace_module
class TttAttention(nn.Module):
    """proj([f_q; g_q]) of two networks that were trained on keys and values, applied to queries.

    f is a gated linear unit for each head, x -> (W1^T x) * silu(W2^T x), g a 3x3 depthwise
    convolution of one more head on the grid. Each takes one step of gradient descent in which keys
    are inputs and values are targets, from weights that are learned, with its gradient normed by
    column (f) or by channel (g); see `vitlinear.ops.inner_step`. Source: arXiv:2512.01643 and its
    released code.
    """

    attn_type = "identity"
    padding_rule = MASK
    row_rule = BANDED

    def __init__(
        self,
        dim: int,
        num_heads: int,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the attention.

        Args:
            dim: Channels, C.
            num_heads: Heads of f, each of D = C / num_heads channels; g has one more.
            proj_drop: Dropout rate of the output.
            backend: One of `vitlinear.ops.BACKENDS`.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: dim does not divide into heads, or the backend is unknown.
        """
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = split_heads(dim, num_heads)
        self.backend = check_backend(backend)
        matrices = (num_heads, self.head_dim, self.head_dim)
        self.w1 = nn.Parameter(torch.empty(matrices, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(matrices, device=device, dtype=dtype))
        self.w3 = nn.Parameter(torch.empty(self.head_dim, 3, 3, device=device, dtype=dtype))
        self.qkv = Linear(dim, 3 * (dim + self.head_dim), device=device, dtype=dtype)
        self.proj = Linear(dim + self.head_dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights of the two networks; the projections have their own."""
        for weight in (self.w1, self.w2, self.w3):
            init_normal_(weight, std=0.02)

    def forward(
        self,
        x: Tensor,
        rotary: RotaryTables | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Train on the whole map, and apply to it.

        Args:
            x: [B, H, W, C].
            rotary: Tables of `vitlinear.ops.full_width_rotary_tables` for the grid and C, which
                turn queries and keys of f; None for no positions.
            key_padding_mask: [B, H, W] bool, True for padding: equal to leaving these tokens out.

        Returns:
            The same shape.
        """
        dim, head_dim = x.shape[3], self.head_dim
        projected, last = self.qkv(x).split([3 * dim, 3 * head_dim], dim=3)
        heads = split_axis(projected.flatten(1, 2), 2, [3, self.num_heads, head_dim])
        f = self.gated_unit(heads, rotary, key_padding_mask)
        g = self.convolution(last, key_padding_mask)
        x = torch.cat((split_axis(f.flatten(2), 1, [x.shape[1], x.shape[2]]), g), dim=3)
        return self.proj_drop(self.proj(x))

    def gated_unit(
        self, qkv: Tensor, rotary: RotaryTables | None, key_padding_mask: Tensor | None
    ) -> Tensor:
        """f, [B, N, 3, h, D] -> [B, N, h, D]."""
        mask = key_padding_mask
        if mask is not None:
            mask = mask.flatten(1)
            qkv = qkv.masked_fill(mask[:, :, None, None, None], 0)
        q, k, v, _ = unpack(qkv)
        k = turned(k, rotary)  # once, for the two that take it
        first = torch.cat((self.w1, self.w2), dim=2).unsqueeze(0)
        # For each sample: a batch of one would ask torch.export whether there are more.
        first = first.to(accumulation_dtype(k.dtype)).expand(k.shape[0], -1, -1, -1)
        reads = scriptable_read(k, first, None, None, self.backend)
        # With heads before tokens, as products of matrices want them.
        values = inner_values(v.transpose(1, 2), reads.transpose(1, 2)).transpose(1, 2)
        state = scriptable_state(k, values, mask, self.backend)
        reads = scriptable_read(q, stepped(first, state, 2), rotary, mask, self.backend)
        return gated(reads)

    def convolution(self, qkv: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """g, [B, H, W, 3 D] -> [B, H, W, D]."""
        if key_padding_mask is not None:
            qkv = qkv.masked_fill(key_padding_mask.unsqueeze(-1), 0)
        if not torch.jit.is_scripting():
            band = band_in_use()
            if band is not None:
                return self.convolution_of_bands(band, qkv, key_padding_mask)
        q, k, v = qkv.chunk(3, dim=3)
        dtype = accumulation_dtype(q.dtype)
        sums = tap_sums(k.to(dtype), v.to(dtype))
        if key_padding_mask is None:
            state = sums / (q.shape[1] * q.shape[2])
        else:
            count = (~key_padding_mask).sum([1, 2]).clamp(min=1).to(dtype)
            state = sums / count[:, None, None]
        return conv_per_sample(q, stepped(self.w3.flatten(1), state, 2))

    @torch.jit.ignore
    def row_reach(self, height: int) -> int:
        """Rows above and below that the convolution needs."""
        return 1

    @torch.jit.ignore
    def convolution_of_bands(
        self, band: Band, qkv: Tensor, key_padding_mask: Tensor | None
    ) -> Tensor:
        """`convolution` of a band."""
        wide, qkv = band.around(qkv, 1)
        q, k, v = qkv.chunk(3, dim=3)
        dtype = accumulation_dtype(q.dtype)
        state = self.state_of_bands(wide, k.to(dtype), v.to(dtype), key_padding_mask)
        return band.within(wide, conv_per_sample(q, stepped(self.w3.flatten(1), state, 2)))

    @torch.jit.ignore
    def state_of_bands(
        self, band: Band, k: Tensor, v: Tensor, key_padding_mask: Tensor | None
    ) -> Tensor:
        """`tap_sums` over the tokens of all bands divided by their number, [B, D, 9].

        The keys of the rows around a band are there; its own values count.
        """
        band.check_rows(v.shape[1])
        own = torch.zeros_like(v[:, :, :, :1])
        own[:, band.own[0] - band.start : band.own[1] - band.start] = 1
        if key_padding_mask is not None:
            own = own.masked_fill(key_padding_mask.unsqueeze(-1), 0)
        number = own.sum((1, 2, 3)).reshape(-1, 1, 1)
        total, number = band.merge((tap_sums(k, v * own), number), merge_sums)
        return total / number.clamp(min=1)


def tap_sums(k: Tensor, v: Tensor) -> Tensor:
    """Products of values with each of the nine neighbours' keys, summed over the map.

    The gradient of sum v * conv(k) for the 3x3 kernel of a depthwise convolution.

    Args:
        k: [B, H, W, D].
        v: Likewise.

    Returns:
        [B, D, 9], row by row.
    """
    height, width = k.shape[1], k.shape[2]
    k = F.pad(k, [0, 0, 1, 1, 1, 1])
    taps: list[Tensor] = []
    for tap in range(9):
        row, col = tap // 3, tap % 3
        taps.append((k[:, row : row + height, col : col + width] * v).sum([1, 2]))
    return torch.stack(taps, dim=2)
