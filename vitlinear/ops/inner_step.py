"""The training step that ViT³ takes inside of its attention, as functions on tensors.

A small network is trained on the tokens of the image, keys in and values out, and then applied to
the queries: test-time training (arXiv:2512.01643). Per head, the network is the gated unit
f(x) = (W1^T x) * silu(W2^T x) with matrices of D x D. One step of gradient descent on the loss
-(c/N) sum_j v_j . f(k_j) with the rate 1 gives, with a_j = W1^T k_j and b_j = W2^T k_j,

    S1 = 1/N sum_j k_j (v_j * silu(b_j))^T      S2 = 1/N sum_j k_j (v_j * a_j * silu'(b_j))^T
    W  <- W + c S / (|c S| + 1)

with norms by column. So a, b and the result are reads of states by queries, S1 and S2 are states of
linear attention with identity features and other values (`linear_attention_state`); what stands
between is here. All of it is differentiable, any number of times: the outer training learns W.

Pairs such as (a, b) and (S1, S2) lie side by side in the last axis, and are read at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .eager import saturate
from .precision import accumulation_dtype
from .tracing import wants_common_operators


def _pair(x: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of the last axis, in the accumulation type."""
    a, b = x.to(accumulation_dtype(x.dtype)).chunk(2, dim=-1)
    return a, b


def _silu_derivative(b: Tensor) -> tuple[Tensor, Tensor]:
    """Logistic function and derivative of silu, sigma (1 + b (1 - sigma))."""
    sigma = b.sigmoid()
    return sigma, sigma * (1 + b * (1 - sigma))


def _rounded(x: Tensor, like: Tensor) -> Tensor:
    return saturate(x, like.dtype).to(like.dtype)


def _gated(x: Tensor) -> Tensor:
    a, b = _pair(x)
    return _rounded(a * F.silu(b), x)


def _values(v: Tensor, reads: Tensor) -> Tensor:
    a, b = _pair(reads)
    _, slope = _silu_derivative(b)
    return _rounded(torch.cat((v * F.silu(b), v * a * slope), dim=-1), reads)


class _Gated(torch.autograd.Function):
    """`gated`, of which autograd keeps what went in alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _gated(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        a, b = _pair(x)
        sigma, slope = _silu_derivative(b)
        return _rounded(torch.cat((grad * (b * sigma), grad * a * slope), dim=-1), x)


class _Values(torch.autograd.Function):
    """`inner_values`, likewise."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, reads: Tensor) -> Tensor:
        ctx.save_for_backward(v, reads)
        return _values(v, reads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        v, reads = ctx.saved_tensors
        (a, b), (grad1, grad2) = _pair(reads), _pair(grad)
        sigma, slope = _silu_derivative(b)
        curvature = sigma * (1 - sigma) * (2 + b * (1 - 2 * sigma))
        grad_v = grad1 * (b * sigma) + grad2 * a * slope
        grad_b = v * (grad1 * slope + grad2 * a * curvature)
        return _rounded(grad_v, v), _rounded(torch.cat((grad2 * slope * v, grad_b), dim=-1), reads)


def gated(x: Tensor) -> Tensor:
    """Output of the gated unit, a silu(b).

    Args:
        x: a and b side by side, [..., 2 D].

    Returns:
        [..., D] in the type of x. What float16 cannot hold saturates, here and in the gradient.
    """
    if torch.jit.is_scripting():
        return _gated(x)
    else:  # noqa: RET505  TorchScript leaves out the branch not taken, but not what follows it
        if torch.compiler.is_compiling() or wants_common_operators():
            return _gated(x)
        return _Gated.apply(x)


def inner_values(v: Tensor, reads: Tensor) -> Tensor:
    """Values of the two states S1 and S2: v silu(b) and v a silu'(b).

    Args:
        v: Values, [..., D].
        reads: a and b side by side, [..., 2 D], in the type of v.

    Returns:
        The two side by side, [..., 2 D], with types as `gated`.
    """
    if torch.jit.is_scripting():
        return _values(v, reads)
    else:  # noqa: RET505
        if torch.compiler.is_compiling() or wants_common_operators():
            return _values(v, reads)
        return _Values.apply(v, reads)


def stepped(weight: Tensor, state: Tensor, dim: int) -> Tensor:
    """W + c S / (|c S| + 1): one step, shorter than 1 along the axis of the norm.

    Where S is 0, as of a sample of padding alone, so is the step, and its gradient is finite.

    Args:
        weight: W, broadcasts to S.
        state: S, in the accumulation type.
        dim: Axis that the 2-norm runs over.

    Returns:
        In the shape and type of S.
    """
    step = state / 3  # c of 3 x 3 taps is 9^-1/2; as released, of matrices too, whatever D is
    square = step.square().sum(dim, keepdim=True)
    # The derivative of the root is infinite at 0, and a product of it with 0 would be NaN, in the
    # second derivative too: what it is taken of must be another number.
    zero = square == 0
    norm = square.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
    return weight.to(step.dtype) + step / (norm + 1)
