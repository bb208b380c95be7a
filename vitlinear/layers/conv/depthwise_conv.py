"""Depthwise convolution of a channels-last token map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module
from vitlinear.ops import cpu

from ..band import LOCAL
from ..layout import known_layout
from ..padding_rule import ZEROS
from ..plain import is_plain


# One step to torch.fx, as `nn.Conv2d` is.
@register_notrace_module
class DepthwiseConv(nn.Conv2d):
    """K x K depthwise convolution, stride 1, same size, on [B, H, W, C].

    A subclass of `nn.Conv2d` with its weight [C, 1, K, K], so that whatever knows convolutions
    (counters, quantisers, folding of x + conv(x) into the weight) knows this one. The permutes are
    views: in memory the input is what PyTorch calls a channels_last image already.
    """

    row_rule = LOCAL
    padding_rule = ZEROS

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the convolution.

        Args:
            dim: Channels, C.
            kernel_size: K, odd.
            device: Where the parameters live.
            dtype: Type of the parameters.
        """
        super().__init__(
            dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        return self.convolve(x)

    def convolve(self, x: Tensor) -> Tensor:
        """As `forward`, for subclasses: TorchScript knows no ``super()``."""
        x = known_layout(x.permute(0, 3, 1, 2))
        if torch.jit.is_scripting():
            x = self._conv_forward(x, self.weight, self.bias)
        else:
            x = cpu.depthwise_conv(x, self.weight, self.bias)
        return x.permute(0, 2, 3, 1)


@register_notrace_module
class ResidualDepthwiseConv(DepthwiseConv):
    """x + conv(x), conv a `DepthwiseConv`.

    Where `vitlinear.ops.cpu` finds it faster, the sum is part of the kernel.
    """

    row_rule = LOCAL

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = known_layout(x.permute(0, 3, 1, 2))
        if torch.jit.is_scripting():
            x = x + self._conv_forward(x, self.weight, self.bias)
        else:
            x = cpu.residual_depthwise_conv(x, self.weight, self.bias)
        return x.permute(0, 2, 3, 1)

    @torch.no_grad()
    @torch.jit.ignore
    def fuse(self) -> DepthwiseConv:
        """One convolution that gives the same: 1 is added to the middle of each kernel."""
        if not is_plain(self, ResidualDepthwiseConv):
            return self
        fused = DepthwiseConv(
            self.in_channels,
            self.kernel_size[0],
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        if self.bias is None:
            fused.bias = None
        fused.load_state_dict(self.state_dict())
        fused.weight += cpu.identity_kernel(self.weight)
        for ours, theirs in zip(fused.parameters(), self.parameters(), strict=True):
            ours.requires_grad_(theirs.requires_grad)
        return fused.train(self.training)
