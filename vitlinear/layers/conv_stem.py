"""Convolutional stem of the RALA, MALA and NaLaFormer pyramids."""

from __future__ import annotations

import torch
from timm.layers import ConvNormAct
from torch import Tensor, nn


class ConvStem(nn.Sequential):
    """Four 3x3 convolutions with batch norm, strides 2, 1, 1, 2: [B, C, H, W] to a quarter size.

    Half the width until the last; GELU after the first three, nothing after the last.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the stem.

        Args:
            in_chans: Channels of the image.
            dim: Channels of the first stage.
            device: Where the parameters live.
            dtype: Type of the parameters.
        """
        widths = (in_chans, dim // 2, dim // 2, dim // 2, dim)
        strides = (2, 1, 1, 2)
        super().__init__(
            *(
                ConvNormAct(
                    widths[i],
                    widths[i + 1],
                    kernel_size=3,
                    stride=strides[i],
                    padding=1,
                    bias=True,
                    act_layer=nn.GELU,
                    apply_act=i < 3,
                    device=device,
                    dtype=dtype,
                )
                for i in range(4)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, in_chans, H, W] -> features [B, dim, ceil(H/4), ceil(W/4)], channels_last."""
        # From here on every map is channels-last in memory, whatever the caller's layout: token
        # layers then take it as [B, H, W, C] without a copy.
        x = x.contiguous(memory_format=torch.channels_last)
        for layer in self:
            x = layer(x)
        return x
