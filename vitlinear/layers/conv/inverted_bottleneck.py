"""Stem and downsampling of MILA and H-ViT³: strided convolutions that are wider than the map.

For detection and segmentation the authors add zeros to odd maps before they downsample them, in
their classifiers they do not; see `InvertedDownsample`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module

from ..band import LOCAL
from ..layout import known_layout
from ..padding_rule import MASK_CHANNELS_FIRST
from .conv_norm_act import ConvNormAct
from .conv_stem import check_images


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """A map [B, C, H, W] with zeros below and to the right up to multiples of a number."""
    rows = (multiple - x.shape[2] % multiple) % multiple
    cols = (multiple - x.shape[3] % multiple) % multiple
    return F.pad(x, [0, cols, 0, rows]) if rows + cols > 0 else x


def zeroed(x: Tensor, mask: Tensor | None) -> Tensor:
    """A map [B, C, H, W] with zeros where the mask [B, H, W] is True, if there is one."""
    return x if mask is None else x.masked_fill(mask.unsqueeze(1), 0)


def every(mask: Tensor | None, stride: int) -> Tensor | None:
    """The padding of what stride-s convolutions make of a map with this padding, [B, H, W]."""
    return None if mask is None else mask[:, ::stride, ::stride]


def doubled(mask: Tensor | None) -> Tensor | None:
    """The padding of a map of twice as many rows and columns, all places valid that have one."""
    if mask is None:
        return None
    return mask.repeat_interleave(2, 1).repeat_interleave(2, 2)


# One step to torch.fx, which cannot follow choices that look at shapes.
@register_notrace_module
class InvertedStem(nn.Module):
    """Five convolutions without bias, each with batch norm: images to a quarter of their size.

    3x3 with stride 2 and ReLU to C/2 channels, two more 3x3 of that width, 3x3 with stride 2 and
    ReLU to 4C, 1x1 to C.

    Attributes:
        pads_odd_maps: Add zeros below and to the right of images, up to a multiple of 4: the form
            that the authors have for detection and segmentation.
    """

    row_rule = LOCAL
    padding_rule = MASK_CHANNELS_FIRST

    def __init__(
        self,
        in_chans: int,
        dim: int,
        residual: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the stem.

        Args:
            in_chans: Channels of the image.
            dim: Channels of the first stage, C.
            residual: Of the two 3x3 convolutions in a row: put a residual around them, and no
                activation after the second (MILA); else a ReLU after each (H-ViT³).
            device: Where the parameters live.
            dtype: Type of the parameters.
        """
        super().__init__()
        self.in_chans = in_chans
        self.residual = residual
        self.pads_odd_maps = False

        half, wide = dim // 2, 4 * dim
        dd: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.conv1 = ConvNormAct(in_chans, half, 3, stride=2, act=nn.ReLU(), **dd)
        self.conv2 = ConvNormAct(half, half, 3, act=nn.ReLU(), **dd)
        self.conv3 = ConvNormAct(half, half, 3, act=None if residual else nn.ReLU(), **dd)
        self.conv4 = ConvNormAct(half, wide, 3, stride=2, act=nn.ReLU(), **dd)
        self.conv5 = ConvNormAct(wide, dim, 1, **dd)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Images to features.

        Args:
            x: [B, in_chans, H, W].
            key_padding_mask: [B, H, W] bool, True for padding: equal to images without it.

        Returns:
            [B, dim, ceil(H/4), ceil(W/4)], channels-last in memory.

        Raises:
            AssertionError: There is no batch axis, or another number of channels.
        """
        x = zeroed(check_images(x, self.in_chans), key_padding_mask)
        if self.pads_odd_maps:
            x = pad_to_multiple(x, 4)
            mask = doubled(every(key_padding_mask, 4))
        else:
            mask = every(key_padding_mask, 2)
        x = zeroed(self.conv1(x), mask)
        y = self.conv3(zeroed(self.conv2(x), mask))
        x = zeroed(x + y if self.residual else y, mask)
        return self.conv5(self.conv4(x))


# One step to torch.fx, as above.
@register_notrace_module
class InvertedDownsample(nn.Module):
    """1x1 convolution and ReLU, depthwise 3x3 of stride 2 and ReLU, 1x1 convolution, batch norm.

    The depthwise convolution has four times the channels that come out. All three have a bias.

    Attributes:
        pads_odd_maps: Add a row of zeros below, and a column to the right, where a side is odd:
            the form that the authors have for detection and segmentation. The depthwise
            convolution then finds in the place added what the first convolution makes of zeros,
            which is ReLU(bias), and else zero padding.
    """

    row_rule = LOCAL
    padding_rule = MASK_CHANNELS_FIRST

    def __init__(
        self,
        in_dim: int,
        dim: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the layer.

        Args:
            in_dim: Channels in.
            dim: Channels out.
            device: Where the parameters live.
            dtype: Type of the parameters.
        """
        super().__init__()
        self.pads_odd_maps = False

        wide = 4 * dim
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_dim, wide, 1, **dd)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(wide, wide, 3, stride=2, padding=1, groups=wide, **dd)
        self.act2 = nn.ReLU()
        self.conv3 = ConvNormAct(wide, dim, 1, **dd)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Halve a map.

        Args:
            x: [B, in_dim, H, W].
            key_padding_mask: [B, H, W] bool, True for padding: equal to maps without it.

        Returns:
            [B, dim, ceil(H/2), ceil(W/2)].
        """
        x, mask = known_layout(x), key_padding_mask
        if self.pads_odd_maps:
            x = pad_to_multiple(zeroed(x, mask), 2)
            mask = doubled(every(mask, 2))
        x = zeroed(self.act1(self.conv1(x)), mask)
        return self.conv3(self.act2(self.conv2(x)))
