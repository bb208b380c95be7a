"""Strided convolution that covers every row and column of its input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layout import known_layout


class CeilConv(nn.Conv2d):
    """K x K convolution whose output has ceil(n / stride) places for a side of n.

    What the padding of a usual convolution lacks for that is added to the right and below, in
    zeros. A subclass of `nn.Conv2d` for the reasons that `DepthwiseConv` gives.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int,
        stride: int,
        padding: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the convolution.

        Args:
            in_dim: Channels in.
            dim: Channels out.
            kernel_size: K.
            stride: Step.
            padding: Rows and columns of zeros on each side.
            device: Where the parameters live.
            dtype: Type of the parameters.
        """
        super().__init__(in_dim, dim, kernel_size, stride, padding, device=device, dtype=dtype)
        # With K - 1 zeros around a side of n there are ceil(n / stride) places for the kernel.
        self.extra = max(kernel_size - 1 - 2 * padding, 0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_dim, H, W] -> [B, dim, ceil(H / stride), ceil(W / stride)]."""
        x = known_layout(x)
        if self.extra > 0:
            x = F.pad(x, [0, self.extra, 0, self.extra])
        return self._conv_forward(x, self.weight, self.bias)
