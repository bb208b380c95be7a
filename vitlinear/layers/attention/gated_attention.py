"""Attention of the RALA and MALA pyramids: one projection, rotary positions, LePE, output gate."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module
from vitlinear.ops import RotaryTables
from vitlinear.ops.backend import check_backend

from ..band import BANDED, Band, band_in_use
from ..conv.depthwise_conv import DepthwiseConv
from ..heads import split_heads
from ..linear import Linear
from ..padding_rule import MASK
from .band_attention import band_attention
from .scriptable import check_attn_type, learns_temperature, scriptable_attention, unpack


# One step to torch.fx, which cannot follow checks and choices that look at shapes. As a module, not
# as functions: TorchScript can then still compile what torch.fx generates.
@register_notrace_module
class GatedAttention(nn.Module):
    """proj((Attention(q, k, v) + dw5(v)) * o) with q, k, v, o from one projection of the input.

    The depthwise convolution of the values is the locally-enhanced position encoding (LePE). The
    output multiplier o has no activation. Source: released code of RALA (arXiv:2411.07635) and
    MALA (arXiv:2507.00698).
    """

    padding_rule = MASK
    row_rule = BANDED
    gate_in_attention = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        attn_type: str,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the attention.

        Args:
            dim: Channels, C.
            num_heads: Heads, each of C / num_heads channels.
            attn_type: A linear mechanism of `vitlinear.ops.MECHANISMS`, or ``'softmax'``.
            proj_drop: Dropout rate of the output.
            backend: One of `vitlinear.ops.BACKENDS`, for linear attention; softmax runs on SDPA.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: dim does not divide into heads of a multiple of 4 channels, or attn_type
                or backend is unknown.
        """
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = split_heads(dim, num_heads, multiple=4)
        self.attn_type = check_attn_type(attn_type)
        self.backend = check_backend(backend)
        self.qkvo = Linear(dim, 4 * dim, device=device, dtype=dtype)
        self.lepe = DepthwiseConv(dim, 5, device=device, dtype=dtype)
        self.proj = Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        if learns_temperature(attn_type):
            self.temperature = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        else:
            self.register_parameter("temperature", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial value of the temperature, D^-0.5; everything else has its own."""
        if self.temperature is not None:
            nn.init.constant_(self.temperature, self.head_dim**-0.5)

    def forward(
        self, x: Tensor, rotary: RotaryTables, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Attend over the whole map.

        Args:
            x: [B, H, W, C].
            rotary: Tables of the H x W grid for this head_dim; for ``lightnet`` those of
                `vitlinear.ops.lrpe_tables`.
            key_padding_mask: [B, H, W] bool, True for padding: equal to a map without it.

        Returns:
            [B, H, W, C].
        """
        if not torch.jit.is_scripting():
            band = band_in_use()
            if band is not None and band.repeats and type(self.qkvo) is Linear:
                return self.forward_in_passes(band, x, rotary, key_padding_mask)
        B, H, W, C = x.shape
        qkvo = self.qkvo(x).reshape(B, H * W, 4, self.num_heads, self.head_dim)
        q, k, v, o, values = unpack(qkvo)
        values = values.reshape(B, H, W, C)
        mask: Tensor | None = None
        if key_padding_mask is not None:
            values = values.masked_fill(key_padding_mask.unsqueeze(-1), 0)
            mask = key_padding_mask.flatten(1)
        lepe = self.lepe(values).reshape(B, H * W, self.num_heads, self.head_dim)
        x = self.proj(self.combine(q, k, v, o, lepe, rotary, mask).reshape(B, H, W, C))
        return self.proj_drop(x)

    @torch.jit.ignore
    def row_gather(self, height: int) -> int:
        """Channels of keys and values that a band needs of all rows: those of softmax attention."""
        return 2 * self.num_heads * self.head_dim if self.attn_type == "softmax" else 0

    @torch.jit.ignore
    def row_keep(self, height: int) -> int:
        """Channels that later passes over a band use again: queries and values."""
        return 0 if self.attn_type == "softmax" else 2 * self.num_heads * self.head_dim

    @torch.jit.ignore
    def forward_in_passes(
        self, band: Band, x: Tensor, rotary: RotaryTables, key_padding_mask: Tensor | None
    ) -> Tensor:
        """`forward` on a band that runs once for each sum: each pass makes what it needs."""
        B, H, W, C = x.shape

        def slice_of(place: int) -> Tensor:
            tokens = self.qkvo.some(x, place * C, (place + 1) * C)
            return tokens.reshape(B, H * W, self.num_heads, self.head_dim)

        def kept(place: int) -> Tensor:
            return band.keep((id(self), place), lambda: slice_of(place))

        def lepe() -> Tensor:
            values = kept(2).reshape(B, H, W, C)
            if key_padding_mask is not None:
                values = values.masked_fill(key_padding_mask.unsqueeze(-1), 0)
            return self.lepe(values).reshape(B, H * W, self.num_heads, self.head_dim)

        out = band_attention(
            band,
            lambda: kept(0),
            lambda: slice_of(1),
            lambda: kept(2),
            self.attn_type,
            rotary,
            None if key_padding_mask is None else key_padding_mask.flatten(1),
            self.temperature,
            lepe,
            (lambda: slice_of(3)) if self.gate_in_attention else None,
        )
        if not self.gate_in_attention:
            out = self.gated(out, slice_of(3))
        return self.proj_drop(self.proj(out.reshape(B, H, W, C)))

    def combine(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lepe: Tensor,
        rotary: RotaryTables,
        mask: Tensor | None,
    ) -> Tensor:
        """The input of the output projection, from [B, N, h, D] each and a mask [B, N]."""
        return self.attention(q, k, v, rotary, lepe, o, mask)

    def gated(self, x: Tensor, o: Tensor) -> Tensor:
        """The gate of the attention where it comes after it, [B, N, h, D] both -> [B, N, C]."""
        return (x * o).flatten(2)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: RotaryTables,
        lepe: Tensor,
        gate: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """(Attention(q, k, v) + lepe) * gate, [B, N, h, D] -> [B, N, h, D]."""
        return scriptable_attention(
            q,
            k,
            v,
            self.attn_type,
            rotary,
            mask,
            self.temperature,
            lepe,
            gate,
            backend=self.backend,
        )


@register_notrace_module
class NormGatedAttention(GatedAttention):
    """proj(LN(Attention(q, k, v) + dw5(v)) * SiLU(o)), the gate of NaLaFormer (arXiv:2506.21137).

    The norm runs over all channels of a token, and a kernel holds those of one head: the fused
    epilogue ends with the sum. Arguments as `GatedAttention`.
    """

    gate_in_attention = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        attn_type: str,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, attn_type, device=device, dtype=dtype, **kwargs)
        self.norm = LayerNorm(dim, eps=1e-5, device=device, dtype=dtype)

    def combine(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lepe: Tensor,
        rotary: RotaryTables,
        mask: Tensor | None,
    ) -> Tensor:
        """The input of the output projection, from [B, N, h, D] each and a mask [B, N]."""
        return self.gated(self.attention(q, k, v, rotary, lepe, None, mask), o)

    def gated(self, x: Tensor, o: Tensor) -> Tensor:
        """See `GatedAttention`."""
        return self.norm(x.flatten(2)) * nn.functional.silu(o.flatten(2))
