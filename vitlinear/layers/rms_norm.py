"""RMS norms: of all channels, and of those of each head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .band import LOCAL


class RmsNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in the type of x.

    Not timm's, which squares float16 as it is: infinity from 256 on. Under autocast the weight is
    cast to the type of the input, without which there is no fused implementation.
    """

    row_rule = LOCAL

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the norm.

        Args:
            dim: Channels, C.
            eps: Added to the mean square.
            device: Where the parameters live.
            dtype: Type of the parameters.
        """
        super().__init__(dim, eps=eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class HeadRmsNorm(nn.Module):
    """RMS norm grouped by head: over the channels of a head, with a weight for each channel."""

    row_rule = LOCAL

    def __init__(
        self,
        dim: int,
        num_heads: int,
        eps: float = 1e-6,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the norm.

        Args:
            dim: Channels, C.
            num_heads: Heads, each of C / num_heads channels.
            eps: Added to the mean square.
            device: Where the parameters live.
            dtype: Type of the parameters.
        """
        super().__init__()
        self.norm = nn.RMSNorm(dim // num_heads, eps=eps, elementwise_affine=False)
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights of one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., h, D] -> [..., C]."""
        return self.norm(x).flatten(-2) * self.weight
