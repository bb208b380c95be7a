"""The training step that ViT³ takes inside of its attention, as functions on tensors.

A small network is trained on the tokens of the image, keys in and values out, and then applied to
the queries: test-time training (arXiv:2512.01643). Per head, the network is
f(x) = (W1^T x) * silu(W2^T x) with matrices of D x D. One step of gradient descent on the loss
-(c/N) sum_j v_j . f(k_j) with the rate 1 gives, with a_j = W1^T k_j and b_j = W2^T k_j,

    S1 = 1/N sum_j k_j (v_j * silu(b_j))^T      S2 = 1/N sum_j k_j (v_j * a_j * silu'(b_j))^T
    W  <- W + c S / (|c S| + 1)

with norms by column. So a, b and the result are reads of states by queries, S1 and S2 are states of
linear attention with identity features and other values (`linear_attention_state`); what stands
between is here. All of it is differentiable, any number of times: the outer training learns W.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .tracing import wants_common_operators

# c: of 3 x 3 taps, 9^-1/2; the released code has it in both branches, whatever D is.
INNER_SCALE = 1 / 3


def _silu_derivative(b: Tensor) -> tuple[Tensor, Tensor]:
    """Logistic function and derivative of silu, sigma (1 + b (1 - sigma))."""
    sigma = b.sigmoid()
    return sigma, sigma * (1 + b * (1 - sigma))


def _values(v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    _, slope = _silu_derivative(b)
    return torch.cat((v * F.silu(b), v * a * slope), dim=-1)


class _InnerValues(torch.autograd.Function):
    """`inner_values`, of which autograd keeps what went in alone."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, reads: Tensor) -> Tensor:
        ctx.save_for_backward(v, reads)
        return _values(v, *reads.chunk(2, dim=-1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        v, reads = ctx.saved_tensors
        a, b = reads.chunk(2, dim=-1)
        grad1, grad2 = grad.chunk(2, dim=-1)
        sigma, slope = _silu_derivative(b)
        curvature = sigma * (1 - sigma) * (2 + b * (1 - 2 * sigma))
        grad2_slope = grad2 * slope
        grad_v = grad1 * (b * sigma) + grad2_slope * a
        grad_b = v * (grad1 * slope + grad2 * a * curvature)
        return grad_v, torch.cat((grad2_slope * v, grad_b), dim=-1)


def inner_values(v: Tensor, reads: Tensor) -> Tensor:
    """Values of the two states S1 and S2 side by side: v silu(b) and v a silu'(b).

    Args:
        v: Values, [..., D].
        reads: a and b side by side, [..., 2 D].

    Returns:
        [..., 2 D].
    """
    if torch.jit.is_scripting():
        a, b = reads.chunk(2, dim=-1)
        return _values(v, a, b)
    else:  # noqa: RET505  TorchScript leaves out the branch not taken, but not what follows it
        if torch.compiler.is_compiling() or wants_common_operators():
            return _values(v, *reads.chunk(2, dim=-1))
        return _InnerValues.apply(v, reads)


def stepped(weight: Tensor, state: Tensor, dims: list[int]) -> Tensor:
    """W + c S / (|c S| + 1): one step, shorter than 1 along the axes of the norm.

    Where S is 0, as of a sample of padding alone, so is the step, and its gradient is finite.

    Args:
        weight: W, broadcasts to S.
        state: S, in the accumulation type.
        dims: Axes that the 2-norm runs over.

    Returns:
        In the shape and type of S.
    """
    step = INNER_SCALE * state
    square = step.square().sum(dims, keepdim=True)
    # The derivative of the root is infinite at 0. By `where` on both sides of it: a product with an
    # infinite derivative would be NaN, in the second derivative too.
    zero = square == 0
    norm = square.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
    return weight.to(step.dtype) + step / (norm + 1)
