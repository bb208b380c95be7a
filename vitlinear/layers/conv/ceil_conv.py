"""Strided convolution that covers every row and column of its input."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..band import LOCAL
from ..layout import known_layout


def _pair(padding: str | tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(padding, str):
        raise ValueError(f"padding takes numbers of rows and columns, got {padding!r}")
    return padding


class CeilConv(nn.Conv2d):
    """K x K convolution whose output has ceil(n / stride) places for a side of n.

    What the padding of a usual convolution lacks for that is added to the right and below, in
    zeros. A subclass of `nn.Conv2d` for the reasons that `DepthwiseConv` gives. Adapters call its
    constructor for layers of low rank beside it.
    """

    row_rule = LOCAL

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make the convolution; arguments as `nn.Conv2d`.

        Raises:
            ValueError: The padding is not in numbers.
        """
        super().__init__(*args, **kwargs)
        # With K - 1 zeros around a side of n there are ceil(n / stride) places for the kernel; with
        # dilation it reaches further.
        rows, cols = (
            max(dilation * (size - 1) - 2 * padding, 0)
            for dilation, size, padding in zip(
                self.dilation, self.kernel_size, _pair(self.padding), strict=True
            )
        )
        self.extra = [0, cols, 0, rows]

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_dim, H, W] -> [B, dim, ceil(H / stride), ceil(W / stride)]."""
        x = known_layout(x)
        if max(self.extra) > 0:
            x = F.pad(x, self.extra)
        return self._conv_forward(x, self.weight, self.bias)
