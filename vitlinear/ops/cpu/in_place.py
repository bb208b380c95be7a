"""Steps that write to their first operand where nobody else wants it.

Large maps spend most of their time in passes over memory, and memory that has just been written to
is in the caches. A caller hands in what it made itself and will not read again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tracing import keeps_nothing


def own(x: Tensor) -> Tensor:
    """x in contiguous memory, of its own where it may be written to."""
    if keeps_nothing():
        return x.clone(memory_format=torch.contiguous_format)
    return x.contiguous()


def times(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor, for a factor that broadcasts to x."""
    if keeps_nothing() and x.dtype == torch.result_type(x, factor):
        return x.mul_(factor)
    return x * factor


def exp(x: Tensor) -> Tensor:
    """The exponential of x."""
    return x.exp_() if keeps_nothing() else x.exp()


def add_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a * b, for a product that broadcasts to x."""
    return x.addcmul_(a, b) if keeps_nothing() else x + a * b
