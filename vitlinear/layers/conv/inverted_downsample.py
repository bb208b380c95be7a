"""Downsampling by an inverted bottleneck with a depthwise convolution of stride 2."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layout import known_layout
from ..padding_rule import SIZES_CHANNELS_FIRST
from ..valid_maps import rounded_up, zero_beyond
from .conv_norm_act import ConvNormAct


class InvertedDownsample(nn.Module):
    """BN(conv1(ReLU(dw3(ReLU(conv1(x)))))), four times as wide between the 1x1 convolutions.

    The depthwise 3x3 convolution has stride 2. All three have biases. Source: the released code of
    MLLA (arXiv:2405.16605) and ViT3 (arXiv:2512.01643).

    Attributes:
        dense_form: Pad sides of odd length with zeros to the right and below before the first
            convolution, as the released detection code does. The bias makes the added places more
            than zeros to the second convolution, which otherwise finds zeros there.
    """

    padding_rule = SIZES_CHANNELS_FIRST

    def __init__(
        self,
        in_dim: int,
        dim: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the module.

        Args:
            in_dim: Channels in.
            dim: Channels out, C.
            device: Where the parameters live.
            dtype: Type of the parameters.
        """
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dense_form = False
        self.conv1 = nn.Conv2d(in_dim, 4 * dim, 1, **dd)
        self.conv2 = nn.Conv2d(4 * dim, 4 * dim, 3, stride=2, padding=1, groups=4 * dim, **dd)
        self.conv3 = ConvNormAct(4 * dim, dim, 1, **dd)
        self.act = nn.ReLU()

    def forward(self, x: Tensor, valid_sizes: list[tuple[int, int]] | None = None) -> Tensor:
        """Halve the sides of a map.

        Args:
            x: [B, in_dim, H, W].
            valid_sizes: Height and width of the part of each map that is no padding.

        Returns:
            [B, dim, ceil(H/2), ceil(W/2)].
        """
        if valid_sizes is not None:
            x = zero_beyond(x, valid_sizes)
        x = known_layout(x)
        if self.dense_form:
            x = F.pad(x, [0, x.shape[3] % 2, 0, x.shape[2] % 2])
        x = self.act(self.conv1(x))
        if valid_sizes is not None:
            x = zero_beyond(x, rounded_up(valid_sizes, 2) if self.dense_form else valid_sizes)
        return self.conv3(self.act(self.conv2(x)))
