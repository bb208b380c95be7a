"""Depthwise convolution with one set of kernels for all heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module
from vitlinear.ops import cpu

from ..band import LOCAL
from ..layout import known_layout
from ..padding_rule import ZEROS
from ..plain import is_plain
from .depthwise_conv import DepthwiseConv


# One step to torch.fx, as `nn.Conv2d` is.
@register_notrace_module
class HeadSharedConv(nn.Conv2d):
    """K x K depthwise convolution, stride 1, same size, on [B, H, W, h * D] with kernels for D.

    Channel c of every head goes through kernel c and has bias c. A subclass of `nn.Conv2d` with
    its weight [D, 1, K, K], as `DepthwiseConv` is.
    """

    row_rule = LOCAL
    padding_rule = ZEROS

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        kernel_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the convolution.

        Args:
            head_dim: Channels of a head, D.
            num_heads: Heads, h, that stand beside each other in the channels.
            kernel_size: K, odd.
            device: Where the parameters live.
            dtype: Type of the parameters.
        """
        super().__init__(
            head_dim,
            head_dim,
            kernel_size,
            padding=kernel_size // 2,
            groups=head_dim,
            device=device,
            dtype=dtype,
        )
        self.num_heads = num_heads
        self.side = kernel_size // 2

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, h * D] -> [B, H, W, h * D]."""
        x = known_layout(x.permute(0, 3, 1, 2))
        weight = self.weight.repeat(self.num_heads, 1, 1, 1)
        bias = self.bias
        if bias is not None:
            bias = bias.repeat(self.num_heads)
        if torch.jit.is_scripting():
            x = F.conv2d(x, weight, bias, padding=self.side, groups=weight.shape[0])
        else:
            x = cpu.depthwise_conv(x, weight, bias)
        return x.permute(0, 2, 3, 1)

    @torch.no_grad()
    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """A `DepthwiseConv` with the kernels of each head written out."""
        if not is_plain(self, HeadSharedConv):
            return self
        fused = DepthwiseConv(
            self.in_channels * self.num_heads,
            self.kernel_size[0],
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        fused.weight.copy_(self.weight.repeat(self.num_heads, 1, 1, 1))
        if self.bias is None:
            fused.bias = None
        else:
            assert fused.bias is not None
            fused.bias.copy_(self.bias.repeat(self.num_heads))
        for ours, theirs in zip(fused.parameters(), self.parameters(), strict=True):
            ours.requires_grad_(theirs.requires_grad)
        return fused.train(self.training)
