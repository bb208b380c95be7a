"""Convolution, batch norm and activation in one module."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..band import LOCAL
from ..plain import is_plain


class ConvNormAct(nn.Module):
    """Convolution with as much padding as keeps the size at stride 1, batch norm, activation.

    timm's module of this name has the activation inside of its norm, where the conversions to
    synchronised batch norm of torch and mmengine lose it without a word.
    """

    row_rule = LOCAL

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel_size: int,
        stride: int = 1,
        act: nn.Module | None = None,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the three.

        Args:
            in_chans: Channels in.
            out_chans: Channels out.
            kernel_size: K, odd.
            stride: Of the convolution.
            act: The activation; None for none.
            bias: Give the convolution a bias, although the batch norm has one.
            device: Where the parameters live.
            dtype: Type of the parameters.
        """
        super().__init__()
        self.conv = nn.Conv2d(
            in_chans,
            out_chans,
            kernel_size,
            stride,
            kernel_size // 2,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.bn = nn.BatchNorm2d(out_chans, device=device, dtype=dtype)
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, ceil(H / stride), ceil(W / stride)]."""
        return self.act(self.bn(self.conv(x)))

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Convolution with the statistics of the batch norm inside, then the activation."""
        conv, bn = self.conv, self.bn
        if not (
            is_plain(self, ConvNormAct)
            and is_plain(conv, nn.Conv2d)
            and is_plain(bn, nn.BatchNorm2d, nn.SyncBatchNorm)
            and bn.running_mean is not None  # else it takes those of the batch
            and not (conv.training or bn.training)
        ):
            return self
        had_bias = conv.bias is not None
        conv = fuse_conv_bn_eval(conv, bn)
        if not had_bias and conv.bias is not None:  # then it is frozen, as made of nothing learned
            conv.bias.requires_grad_(bn.bias is not None and bn.bias.requires_grad)
        return conv if is_plain(self.act, nn.Identity) else nn.Sequential(conv, self.act)
