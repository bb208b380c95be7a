"""Softmax attention of long sequences on CPUs, where SDPA multiplies with MKL (see `linear`).

Everywhere else softmax attention is `torch.nn.functional.scaled_dot_product_attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import product, runs_on_onednn

# From here on, the products outweigh what a call for each head costs (`benchmarks/README.md`).
MIN_TOKENS = 512
BLOCK = 256  # queries whose weights are in memory at a time, N numbers each


def runs_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `softmax_in_blocks` takes these [B, h, N, D]: many tokens, no gradient."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and runs_on_onednn(q, k)
        and q.shape[2] >= MIN_TOKENS
    )


def softmax_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, a head and a block of queries at a time.

    Args:
        q: [B, h, N, D]; k and v likewise, any strides.
        k: Keys.
        v: Values.

    Returns:
        [B, N, h, D], contiguous.
    """
    B, h, N, D = q.shape
    out = q.new_empty(B, N, h, D)
    for queries, keys, values, result in zip(
        *(x.flatten(0, 1) for x in ((q * D**-0.5).contiguous(), k.contiguous(), v.contiguous())),
        (out[b, :, i] for b in range(B) for i in range(h)),
        strict=True,
    ):
        for start in range(0, N, BLOCK):
            weights = product(queries[start : start + BLOCK], keys).softmax(-1)
            result[start : start + BLOCK] = product(weights, values.t())
    return out
