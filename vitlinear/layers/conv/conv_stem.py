"""Convolutional stem of the RALA, MALA and NaLaFormer pyramids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitlinear.ops.tracing import under_transforms

from ..band import LOCAL
from ..layout import known_layout
from .conv_norm_act import ConvNormAct


def check_images(x: Tensor, in_chans: int) -> Tensor:
    """Check the images that a model is given, [B, in_chans, H, W], and make them channels-last.

    From here on every map is channels-last in memory, whatever the caller's layout: token layers
    then take it as [B, H, W, C] without a copy.

    Raises:
        AssertionError: There is no batch axis, another number of channels, or no pixel.
    """
    torch._assert(x.dim() == 4, "images must be [B, C, H, W]; one image needs a batch axis")
    torch._assert(
        x.shape[1] == in_chans,
        f"the model takes images of {in_chans} channels; for others make it with in_chans",
    )
    torch._assert(x.shape[2] * x.shape[3] > 0, "images must have pixels; one side has none")
    # Two conditions, for TorchScript to leave out what it cannot read.
    if not torch.jit.is_scripting():  # noqa: SIM102
        if under_transforms():  # vmap cannot tell layouts
            return x
    return known_layout(x.contiguous(memory_format=torch.channels_last))


class ConvStem(nn.Module):
    """Four 3x3 convolutions with batch norm, strides 2, 1, 1, 2: [B, C, H, W] to a quarter size.

    Half the width until the last; GELU after the first three, nothing after the last.
    """

    row_rule = LOCAL

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
        super().__init__()
        self.in_chans = in_chans

        half = dim // 2
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = ConvNormAct(in_chans, half, 3, stride=2, act=nn.GELU(), **dd)
        self.conv2 = ConvNormAct(half, half, 3, act=nn.GELU(), **dd)
        self.conv3 = ConvNormAct(half, half, 3, act=nn.GELU(), **dd)
        self.conv4 = ConvNormAct(half, dim, 3, stride=2, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> features [B, dim, ceil(H/4), ceil(W/4)], channels_last.

        Raises:
            AssertionError: There is no batch axis, or another number of channels.
        """
        x = check_images(x, self.in_chans)
        return self.conv4(self.conv3(self.conv2(self.conv1(x))))
