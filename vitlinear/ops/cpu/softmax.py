"""Softmax attention: PyTorch's SDPA, but for long sequences on CPUs where MKL does not keep up.

SDPA takes MKL; `products` tells more of that and oneDNN.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop,
    sdpa_flop,
)

from .products import outdoes_batches, product

# From here on, the products outweigh what a call for each head costs.
MIN_TOKENS = 512
LOG2_E = math.log2(math.e)
BLOCK = 256  # queries whose weights are in memory at a time, N numbers each
# Logits to base 2, and values, up to which weights need no shift: 2^64 each, their products with
# values summed over 2^31 tokens stay within float32's 2^128, as the least, 2^-64, do within 2^-126.
MAX_LOGIT = 64
MAX_VALUE = 2**32


def softmax_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`sdpa`, a head and a block of queries at a time; contiguous.

    Weights are powers of 2, which take PyTorch a quarter of the time of `exp` on such CPUs, and are
    divided by their sum after the product with the values. A row's largest logit is
    taken from it only where it may exceed `MAX_LOGIT`, by the inequality of Cauchy and Schwarz,
    or a value exceeds `MAX_VALUE`.
    """
    B, h, N, D = q.shape
    out = q.new_empty(B, N, h, D)
    q = q * (D**-0.5 * LOG2_E)
    q_squared, k_squared = (x.square().sum(-1).amax(-1) for x in (q, k))
    # False for NaN too.
    in_range = (q_squared * k_squared <= MAX_LOGIT**2) & (v.abs().amax((-2, -1)) <= MAX_VALUE)
    for queries, keys, values, result, unshifted in zip(
        *(x.contiguous().flatten(0, 1) for x in (q, k, v)),
        (out[b, :, i] for b in range(B) for i in range(h)),
        in_range.flatten().tolist(),
        strict=True,
    ):
        for start in range(0, N, BLOCK):
            rows = slice(start, start + BLOCK)
            logits = product(queries[rows], keys)
            if not unshifted:
                logits -= logits.amax(-1, keepdim=True)
            weights = torch.exp2(logits, out=logits)  # in memory that the caches hold
            total = weights.sum(-1, keepdim=True)
            torch.div(product(weights, values.t()), total, out=result[rows])
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
    faster = outdoes_batches(q, k)
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

# PyTorch's counter knows its kernels for GPUs, and takes those for CPUs for free.
for packet, formula in (
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, sdpa_flop),
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, sdpa_backward_flop),
):
    if packet not in flop_registry:
        register_flop_formula(packet, get_raw=True)(formula)
