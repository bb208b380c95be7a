"""Norms of vectors that neither overflow nor meet a root of zero."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RMS_EPS = 1e-6
SMALLEST = 1e-12


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last axis; shorter than 1 where no channel reaches 1e-12, and 0 for 0.

    The greatest channel is taken out first: squares of the rest are at most 1.
    """
    largest = x.detach().abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    x = x / largest
    return x * x.square().sum(-1, keepdim=True).clamp(min=1).rsqrt()


def length(x: Tensor) -> Tensor:
    """|x| over the last axis, [..., D] -> [..., 1], with the slope 0 at 0."""
    largest = x.detach().abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    square = (x / largest).square().sum(-1, keepdim=True)
    zero = square == 0
    return largest * square.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """x / sqrt(mean x^2 + 1e-6) over the last axis, times a weight that broadcasts to x."""
    x = F.rms_norm(x, (x.shape[-1],), eps=RMS_EPS)
    return x if weight is None else x * weight.to(x.dtype)


def rms_norm_definition(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """`rms_norm`, written to be read: for definitions."""
    return x / (x.square().mean(-1, keepdim=True) + RMS_EPS).sqrt() * weight


def heads_matrix(x: Tensor, weight: Tensor) -> Tensor:
    """A matrix of each head, or of all: x [B, N, h, D], weight [h or 1, D, E] -> [B, N, h, E]."""
    # A product with a batch of matrices would copy them for each token.
    weight = weight.to(x.dtype)
    if weight.shape[0] == 1:
        return x @ weight[0]
    out = x.permute(2, 0, 1, 3).flatten(1, 2) @ weight
    # Tokens come first before their axis is split: the ONNX exporter leaves out two reshapes with
    # nothing but the product in between, and then multiplies samples by the matrices of heads.
    return out.transpose(0, 1).unflatten(0, x.shape[:2])


def identity_matrices(weight: Tensor) -> None:
    """Fill matrices [h, D, E] with ones on the diagonal, zeros elsewhere."""
    with torch.no_grad():
        weight.zero_()
        weight.diagonal(dim1=-2, dim2=-1).fill_(1)
