"""Attention of MILA: linear attention in the place of Mamba's selective state space model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module
from vitlinear.ops import RotaryTables
from vitlinear.ops.backend import check_backend

from ..band import BANDED, LOCAL
from ..conv.depthwise_conv import DepthwiseConv
from ..heads import split_heads
from ..linear import Linear
from ..padding_rule import MASK
from ..recompute import remaking, run_recomputing
from .scriptable import scriptable_attention, unpack


# One step to torch.fx, as `GatedAttention`.
@register_notrace_module
class InputValueAttention(nn.Module):
    """(Attention(q, k, u) + dw3(u)) * gate with q, k from one projection of u.

    The input itself is the values, and no projection follows: inside of `MilaAttention` both would
    be projections of a projection. phi = elu + 1, and the rotary encoding turns the whole width of
    a token, so that each head has angles of its own.
    """

    attn_type = "elu"
    padding_rule = MASK
    row_rule = BANDED

    def __init__(
        self,
        dim: int,
        num_heads: int,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the attention.

        Args:
            dim: Channels, C.
            num_heads: Heads, each of C / num_heads channels.
            backend: One of `vitlinear.ops.BACKENDS`.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: dim does not divide into heads of an even number of channels or is no
                multiple of 4, or the backend is unknown.
        """
        super().__init__()
        if dim % 4:
            raise ValueError(f"2-D rotary encoding needs a dim divisible by 4, got {dim}")
        self.num_heads = num_heads
        self.head_dim = split_heads(dim, num_heads, multiple=2)
        self.backend = check_backend(backend)
        self.qk = Linear(dim, 2 * dim, device=device, dtype=dtype)
        self.lepe = DepthwiseConv(dim, 3, device=device, dtype=dtype)

    def forward(
        self, u: Tensor, gate: Tensor, rotary: RotaryTables, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Attend over the whole map.

        Args:
            u: [B, H, W, C].
            gate: Multiplies what comes out, like u.
            rotary: Tables of `vitlinear.ops.full_width_rotary_tables` for the grid and C.
            key_padding_mask: [B, H, W] bool, True for padding: equal to a map without it.

        Returns:
            [B, H, W, C].
        """
        B, H, W, C = u.shape
        h, D = self.num_heads, self.head_dim
        mask: Tensor | None = None
        if key_padding_mask is not None:
            u = u.masked_fill(key_padding_mask.unsqueeze(-1), 0)
            mask = key_padding_mask.flatten(1)
        q, k = unpack(self.qk(u).reshape(B, H * W, 2, h, D))
        v = u.reshape(B, H * W, h, D)
        lepe = self.lepe(u).reshape(B, H * W, h, D)
        gate = gate.reshape(B, H * W, h, D)
        out = scriptable_attention(
            q, k, v, "elu", rotary, mask, lepe=lepe, gate=gate, backend=self.backend
        )
        return out.reshape(B, H, W, C)


# One step to torch.fx, as above.
@register_notrace_module
class MilaAttention(nn.Module):
    """proj(attend(SiLU(dw3(in_proj(x))), SiLU(gate_proj(x)))), attend an `InputValueAttention`.

    The block design of Mamba, with linear attention in the place of the selective state space
    model. Source: released code of MLLA, by now MILA (arXiv:2405.16605).
    """

    padding_rule = MASK
    row_rule = LOCAL

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
            ValueError: As `InputValueAttention`.
        """
        super().__init__()
        self.in_proj = Linear(dim, dim, device=device, dtype=dtype)
        self.gate_proj = Linear(dim, dim, device=device, dtype=dtype)
        self.dwconv = DepthwiseConv(dim, 3, device=device, dtype=dtype)
        self.act = nn.SiLU()
        self.gate_act = nn.SiLU()
        self.attend = InputValueAttention(dim, num_heads, backend, device=device, dtype=dtype)
        self.proj = Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Tensor, rotary: RotaryTables, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Attend over the whole map; arguments and result as `InputValueAttention`, but no gate."""
        u = self.in_proj(x)
        if key_padding_mask is not None:
            u = u.masked_fill(key_padding_mask.unsqueeze(-1), 0)
        u, gate = self.dwconv(u), self.gate_proj(x)
        if torch.jit.is_scripting():
            x = self.attend(self.act(u), self.gate_act(gate), rotary, key_padding_mask)
        else:
            x = self.attended(u, gate, rotary, key_padding_mask)
        return self.proj_drop(self.proj(x))

    @torch.jit.unused
    def attended(
        self, u: Tensor, gate: Tensor, rotary: RotaryTables, key_padding_mask: Tensor | None
    ) -> Tensor:
        """attend(act(u), gate_act(gate)), of which backward makes the two activations again."""
        g, steps = self.gate_act(gate), (self.act, self.attend)
        if torch.compiler.is_compiling():  # compilers make cheap steps again by themselves
            return run_recomputing(steps, u, g, rotary, key_padding_mask)
        with remaking(self.gate_act, g, gate):
            return run_recomputing(steps, u, g, rotary, key_padding_mask)
