"""LightNet attention: softmax of keys over the tokens, cosine positions, a gate of low rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module
from vitlinear.ops import lrpe_tables, table_dtype
from vitlinear.ops.backend import check_backend

from ..band import BANDED
from ..heads import split_heads
from ..linear import Linear
from ..padding_rule import MASK
from ..positions.map_rotary import of_band, rows_of_map
from ..rms_norm import HeadRmsNorm
from .scriptable import scriptable_attention, unpack


# One step to torch.fx, as `GatedAttention`.
@register_notrace_module
class LightNetAttention(nn.Module):
    """proj(norm(R(q) sum_j R(kappa_j) v_j^T) * sigmoid(gate2(gate1(x)))), not causal.

    q = SiLU(W_q x), kappa the softmax of W_k x over the tokens, channel by channel, v = W_v x; R is
    MD-LRPE (`vitlinear.ops.lrpe_tables`); the norm is an RMS norm grouped by head, and the gate has
    the rank of a head. No projection has a bias. Source: the description in arXiv:2405.21022 and
    the modules for language that its authors have published; in what the two leave open, norm
    before gate and its sigmoid among it, this is our reading.
    """

    attn_type = "lightnet"
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
            num_heads: Heads, each of C / num_heads channels.
            proj_drop: Dropout rate of the output.
            backend: One of `vitlinear.ops.BACKENDS`.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: dim does not divide into heads of an even number of channels, or the
                backend is unknown.
        """
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = split_heads(dim, num_heads, multiple=2)
        self.backend = check_backend(backend)
        self.qkv = Linear(dim, 3 * dim, bias=False, device=device, dtype=dtype)
        self.norm = HeadRmsNorm(dim, num_heads, device=device, dtype=dtype)
        self.gate1 = Linear(dim, self.head_dim, bias=False, device=device, dtype=dtype)
        self.gate2 = Linear(self.head_dim, dim, bias=False, device=device, dtype=dtype)
        self.proj = Linear(dim, dim, bias=False, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Tensor, height: int, width: int, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Attend over the whole map.

        Args:
            x: [B, height * width, C].
            height: Of the map.
            width: Of the map.
            key_padding_mask: [B, N] bool, True for padding: equal to leaving these tokens out.

        Returns:
            The same shape.
        """
        B, N, _ = x.shape
        q, k, v, _ = unpack(self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim))
        rotary = of_band(
            lrpe_tables(rows_of_map(height), width, self.head_dim, x.device, table_dtype(x))
        )
        gate = self.gate2(self.gate1(x)).sigmoid()
        out = scriptable_attention(
            q, k, v, "lightnet", rotary, key_padding_mask, backend=self.backend
        )
        x = self.norm(out) * gate
        return self.proj_drop(self.proj(x))
