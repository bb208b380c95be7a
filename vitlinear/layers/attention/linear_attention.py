"""Linear attention between two projections, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module
from vitlinear.ops.backend import check_backend

from ..band import BANDED
from ..heads import split_heads
from ..layout import split_axis
from ..linear import Linear
from ..padding_rule import MASK
from .scriptable import check_attn_type, scriptable_attention, unpack


# One step to torch.fx, for the reasons that `GatedAttention` gives.
@register_notrace_module
class LinearAttention(nn.Module):
    """proj(Attention(q, k, v)) with q, k, v from one projection of the tokens; no positions.

    With a temperature this is the linear global attention of L2ViT (arXiv:2501.16182), without it
    the plain baseline (arXiv:2006.16236) in the layout of ViT.
    """

    padding_rule = MASK
    row_rule = BANDED

    def __init__(
        self,
        dim: int,
        num_heads: int,
        attn_type: str,
        temperature: bool = False,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the attention.

        Args:
            dim: Channels, C.
            num_heads: Heads, each of D = C / num_heads channels.
            attn_type: A mechanism of `vitlinear.ops.MECHANISMS`, or ``'softmax'``.
            temperature: Learn a factor of the state for each head; D^-0.5 at first. Softmax
                attention has no state to scale.
            proj_drop: Dropout rate of the output.
            backend: One of `vitlinear.ops.BACKENDS`.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: dim does not divide into heads, attn_type or backend is unknown, or
                softmax attention is to have a temperature.
        """
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = split_heads(dim, num_heads)
        self.attn_type = check_attn_type(attn_type)
        self.backend = check_backend(backend)
        if temperature and attn_type == "softmax":
            raise ValueError("softmax attention has no state for a temperature to scale")
        if temperature:
            self.temperature = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        else:
            self.register_parameter("temperature", None)
        self.qkv = Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.proj = Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial value of the temperature; the projections have their own."""
        if self.temperature is not None:
            nn.init.constant_(self.temperature, self.head_dim**-0.5)

    @torch.jit.ignore
    def row_gather(self, height: int) -> int:
        """Channels of keys and values that a band needs of all rows: those of softmax attention."""
        return 2 * self.num_heads * self.head_dim if self.attn_type == "softmax" else 0

    def forward(
        self,
        x: Tensor,
        height: int = 0,
        width: int = 0,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend over all tokens.

        Args:
            x: [B, N, C], or a map [B, H, W, C].
            height: Unused; blocks that serve several attentions tell it to all.
            width: Unused, too.
            key_padding_mask: x.shape[:-1] bool, True for padding: equal to leaving these tokens
                out.

        Returns:
            In the shape of x.
        """
        qkv = split_axis(self.qkv(x).flatten(1, -2), 2, [3, self.num_heads, self.head_dim])
        q, k, v, _ = unpack(qkv)
        mask = key_padding_mask
        if mask is not None:
            mask = mask.flatten(1)
        out = scriptable_attention(
            q, k, v, self.attn_type,
            key_padding_mask=mask, head_scale=self.temperature, backend=self.backend,
        )  # fmt: skip
        return self.proj_drop(self.proj(out.reshape(x.shape)))
