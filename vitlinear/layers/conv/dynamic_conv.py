"""Depthwise convolution whose kernel each sample computes from its own tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..band import BANDED, LOCAL, band_in_use


class TokenConv(nn.Conv1d):
    """A 1x1 convolution of single tokens, [B, C_in, 1] -> [B, C_out, 1]: one product of matrices.

    Which convolution PyTorch takes depends on batch and size: each would be a compiled program.
    Arguments as `nn.Conv1d`.
    """

    row_rule = LOCAL

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, 1] -> [B, C_out, 1]."""
        return grouped_linear(x.squeeze(2), self.weight, self.bias, self.groups).unsqueeze(2)


class DynamicConv(nn.Module):
    """3x3 depthwise convolution with a kernel for each sample and channel, made from a mean token.

    kernel = W2 GELU(W1 mean), both 1x1 and grouped by head, 9 C channels out: nine for each
    channel, row by row. Zero padding, stride 1, no bias beyond that of W2. It is the local term of
    InLine attention (arXiv:2412.06590, section 4.3; widths and order as in the released
    checkpoints).
    """

    row_rule = BANDED

    def __init__(
        self,
        dim: int,
        num_heads: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the convolution.

        Args:
            dim: Channels, C.
            num_heads: Groups in which channels of the mean token mix; divides dim.
            device: Where the parameters live.
            dtype: Type of the parameters.
        """
        super().__init__()
        self.fc1 = TokenConv(dim, dim, 1, groups=num_heads, device=device, dtype=dtype)
        self.act = nn.GELU()
        self.fc2 = TokenConv(dim, 9 * dim, 1, groups=num_heads, device=device, dtype=dtype)

    @torch.jit.ignore
    def row_reach(self, height: int) -> int:
        """Rows above and below that the kernel needs."""
        return 1

    def forward(self, x: Tensor, mean: Tensor) -> Tensor:
        """Convolve.

        Args:
            x: Map, [B, H, W, C], any strides.
            mean: Mean token of each sample, [B, C].

        Returns:
            [B, H, W, C].
        """
        kernel = self.fc2(self.act(self.fc1(mean.unsqueeze(2))))
        kernel = kernel.reshape(x.shape[0], x.shape[3], 9)
        if not torch.jit.is_scripting():
            band = band_in_use()
            if band is not None:
                wide, x = band.around(x, 1)
                return band.within(wide, conv_per_sample(x, kernel))
        return conv_per_sample(x, kernel)


def conv_per_sample(x: Tensor, kernel: Tensor) -> Tensor:
    """3x3 depthwise convolution with a kernel for each sample and channel, zero padding.

    Args:
        x: [B, H, W, C], any strides.
        kernel: [B, C, 9], row by row.

    Returns:
        [B, H, W, C].
    """
    if torch.jit.is_scripting():
        return grouped_conv(x, kernel)
    else:  # noqa: RET505  TorchScript leaves out the branch not taken, but not what follows it
        # A convolution of no groups is an error; a batch of no samples is not.
        if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export() or x.shape[0] == 0:
            return shifted_sum(x, kernel)
        return grouped_conv(x, kernel)


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """A grouped linear map, as one product of matrices.

    Args:
        x: [B, C_in].
        weight: [C_out, C_in / groups, 1].
        bias: [C_out], or None.
        groups: Number of groups.

    Returns:
        [B, C_out].
    """
    weight = weight.squeeze(2).unflatten(0, [groups, -1]).transpose(1, 2)
    # Two conditions, for TorchScript to leave out what it cannot read.
    if not torch.jit.is_scripting():  # noqa: SIM102
        # With groups before samples, strides depend on the batch as `known_layout` tells.
        if torch.onnx.is_in_onnx_export():
            out = (x.unflatten(1, [groups, 1, -1]) @ weight).flatten(1)
            return out if bias is None else out + bias
    x = x.unflatten(1, [groups, -1]).transpose(0, 1)
    if bias is None:
        out = torch.bmm(x, weight)
    else:
        out = torch.baddbmm(bias.unflatten(0, [groups, 1, -1]), x, weight)
    return out.transpose(0, 1).flatten(1)


def grouped_conv(x: Tensor, kernel: Tensor) -> Tensor:
    """One convolution for the whole batch, samples standing beside each other in the channels.

    With B C channels last in memory it is two to four times faster on a CPU, forward and backward,
    than with them first, and ten times faster than `shifted_sum`.

    Args:
        x: [B, H, W, C].
        kernel: [B, C, 9].

    Returns:
        [B, H, W, C].
    """
    B, H, W, C = x.shape
    x = x.permute(1, 2, 0, 3).reshape(1, H, W, B * C).permute(0, 3, 1, 2)
    x = F.conv2d(x, kernel.reshape(B * C, 1, 3, 3).to(x.dtype), padding=1, groups=B * C)
    return x.permute(0, 2, 3, 1).reshape(H, W, B, C).permute(2, 0, 1, 3)


def shifted_sum(x: Tensor, kernel: Tensor) -> Tensor:
    """The same as nine multiply-adds: compilers fuse them, and any batch size can be exported.

    A convolution of B C groups would tie an exported program to its batch size.
    """
    taps = kernel.to(x.dtype).transpose(1, 2)[:, :, None, None]  # [B, 9, 1, 1, C]
    x = F.pad(x, (0, 0, 1, 1, 1, 1))
    out = x[:, :-2, :-2] * taps[:, 0]
    for tap in range(1, 9):
        row, col = divmod(tap, 3)
        out = out + x[:, row : row - 2 or None, col : col - 2 or None] * taps[:, tap]
    return out
