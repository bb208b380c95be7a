"""Depthwise convolutions, whose larger kernels oneDNN has no fast weight gradient for."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from ..tracing import stands_for_many, wants_common_operators
from .products import runs_on_onednn

PIECE = 3  # the kernel that is fast


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, padding: int, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, weight and bias, as far as asked for."""
    shape = [[1, 1], [padding, padding], [1, 1], False, [0, 0], weight.shape[0]]
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], *shape, mask
    )
    return found


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the K x K kernels, put together from those of the 3 x 3 kernels in them.

    Args:
        grad: Of the output, [B, C, H, W].
        x: The input, [B, C, H, W].
        weight: [C, 1, K, K], K odd; only its shape counts.
    """
    side, (height, width) = weight.shape[-1], x.shape[2:]
    padded = F.pad(x, [side // 2] * 4)
    corner = weight[..., :PIECE, :PIECE]
    starts = range(0, side - PIECE + 1, PIECE - 1)  # the last line of one is the first of the next
    found = torch.empty_like(weight)
    for i in starts:
        for j in starts:
            seen = padded[..., i : i + height + PIECE - 1, j : j + width + PIECE - 1]
            piece = _gradients(grad, seen, corner, 0, [False, True, False])[1]
            found[..., i : i + PIECE, j : j + PIECE] = piece
    return found


@custom_op("vitlinear::depthwise_weight_gradient", mutates_args=(), device_types="cpu")
def weight_gradient_op(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`weight_gradient` in compiled graphs, where its views would each be copied."""
    return weight_gradient(grad, x, weight)


@weight_gradient_op.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(weight)


@register_flop_formula(torch.ops.vitlinear.depthwise_weight_gradient)
def weight_gradient_flops(
    grad: torch.Size, x: torch.Size, weight: torch.Size, *_: Any, **__: Any
) -> int:
    """Two for each multiply-add, of every place with every weight of its channel."""
    return 2 * math.prod(grad) * math.prod(weight[2:])


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        side = weight.shape[-1] // 2
        return F.conv2d(x, weight, bias, padding=(side, side), groups=weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        side = weight.shape[-1] // 2
        grad_x = grad_weight = None
        if needs_x:
            grad_x = _gradients(grad, x, weight, side, [True, False, False])[0]
        if needs_weight and (stands_for_many(grad) or wants_common_operators()):
            grad_weight = _gradients(grad, x, weight, side, [False, True, False])[1]
        elif needs_weight and torch.compiler.is_compiling():
            grad_weight = torch.ops.vitlinear.depthwise_weight_gradient(grad, x, weight)
        elif needs_weight:
            grad_weight = weight_gradient(grad, x, weight)
        return grad_x, grad_weight, grad.sum((0, 2, 3)) if needs_bias else None


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A depthwise convolution that keeps the size of the map.

    Args:
        x: [B, C, H, W], channels-last in memory.
        weight: [C, 1, K, K], K odd.
        bias: [C], or None.

    Returns:
        [B, C, H, W].
    """
    side = weight.shape[-1]
    if side > PIECE and torch.is_grad_enabled() and runs_on_onednn(x, weight):
        out: Tensor = _DepthwiseConv.apply(x, weight, bias)
        return out
    return F.conv2d(x, weight, bias, padding=(side // 2, side // 2), groups=weight.shape[0])


def identity_kernel(weight: Tensor) -> Tensor:
    """The kernel [K, K] whose convolution gives what goes in."""
    side = weight.shape[-1]
    kernel = weight.new_zeros(side, side)
    kernel[side // 2, side // 2] = 1
    return kernel


def residual_depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x + `depthwise_conv`; in float32 on CPUs the sum is part of the kernel."""
    if runs_on_onednn(x, weight):
        return depthwise_conv(x, weight + identity_kernel(weight), bias)
    # Half precision would round the weight in 1 + weight, and GPUs' TF32 would round x.
    return x + depthwise_conv(x, weight, bias)
