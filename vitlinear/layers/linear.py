"""Linear layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module
from vitlinear.ops import cpu

from .band import LOCAL


# One step to torch.fx, as `nn.Linear` is.
@register_notrace_module
class Linear(nn.Linear):
    """`nn.Linear` by the faster of the libraries, with the activation that was folded into it.

    Attributes:
        activation: ``'none'`` or ``'gelu'``; see `vitlinear.ops.cpu.linear`.
        frozen: Whether `fuse` was called; likewise.
    """

    row_rule = LOCAL

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the layer; arguments as `nn.Linear`."""
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = "none"
        self.frozen = False

    def extra_repr(self) -> str:
        """Arguments, and the activation if there is one."""
        folded = "" if self.activation == "none" else f", activation={self.activation}"
        return super().extra_repr() + folded

    def forward(self, x: Tensor) -> Tensor:
        """[..., C_in] -> [..., C_out]."""
        if torch.jit.is_scripting():
            x = F.linear(x, self.weight, self.bias)
            return F.gelu(x) if self.activation == "gelu" else x
        return cpu.linear(x, self.weight, self.bias, self.activation, self.frozen)

    @torch.jit.ignore
    def some(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Channels of the output from one to another, without making the others."""
        bias = None if self.bias is None else self.bias[start:stop]
        return cpu.linear(x, self.weight[start:stop], bias, self.activation, self.frozen)

    @torch.jit.ignore
    def fuse(self) -> Linear:
        """This layer, free to keep a copy of its weight in a faster layout."""
        self.frozen = "weight" in self._parameters  # and is not made anew for each call
        return self
