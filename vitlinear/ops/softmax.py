"""Softmax attention: PyTorch's SDPA, but for long sequences on CPUs, where it takes MKL.

`linear` tells more of MKL and oneDNN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula, sdpa_flop

from .linear import product, runs_on_onednn

# From here on, the products outweigh what a call for each head costs (`benchmarks/README.md`).
MIN_TOKENS = 512
BLOCK = 256  # queries whose weights are in memory at a time, N numbers each


def softmax_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`sdpa`, a head and a block of queries at a time; contiguous."""
    B, h, N, D = q.shape
    out = q.new_empty(B, N, h, D)
    for queries, keys, values, result in zip(
        *(x.flatten(0, 1) for x in ((q * D**-0.5).contiguous(), k.contiguous(), v.contiguous())),
        (out[b, :, i] for b in range(B) for i in range(h)),
        strict=True,
    ):
        for start in range(0, N, BLOCK):
            weights = product(queries[start : start + BLOCK], keys)
            torch.softmax(weights, -1, out=weights)  # in memory that the caches hold
            result[start : start + BLOCK] = product(weights, values.t())
    return out


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v by what is fastest.

    Args:
        q: [B, h, N, D]; k and v likewise, any strides.
        k: Keys.
        v: Values.

    Returns:
        [B, N, h, D].
    """
    faster = not torch.is_grad_enabled() and runs_on_onednn(q, k)
    if faster and torch.compiler.is_compiling():
        out: Tensor = torch.ops.vitlinear.sdpa(q, k, v)
        return out
    if faster and q.shape[2] >= MIN_TOKENS:
        return softmax_in_blocks(q, k, v)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@custom_op("vitlinear::sdpa", mutates_args=(), device_types="cpu")
def sdpa_op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`sdpa` in compiled programs: one operator for any number of tokens, so one program."""
    with torch.no_grad():  # which the program may have set for this part alone
        return sdpa(q, k, v).contiguous()


@sdpa_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    B, h, N, D = q.shape
    return q.new_empty(B, N, h, D)


register_flop_formula(torch.ops.vitlinear.sdpa, get_raw=True)(sdpa_flop)
