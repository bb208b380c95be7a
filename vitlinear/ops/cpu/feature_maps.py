"""Feature maps in fewer passes over memory, and without branches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tracing import keeps_nothing, wants_common_operators


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, without a gradient; [..., D] -> [..., D] in new contiguous memory.

    On CPUs it is the larger of x + 1 and exp(min(x, 0)), which are equal at 0 and cross nowhere
    else. elu takes from exp(x) the 1 that is added again: a float32 result is off by 4e-6 of itself
    at x = -5 and by all of it at -30, where this is exact to rounding.
    """
    if torch.compiler.is_compiling():
        if torch.is_grad_enabled() or wants_common_operators():
            return F.elu(x) + 1
        # Inductor computes elu anew in each loop that reads it, but an exponential once.
        return x.clamp(max=0).exp() + x.clamp(min=0)
    if x.device.type != "cpu" or wants_common_operators():
        return F.elu(x.contiguous()).add_(1)
    if x.is_contiguous():
        power, line = x.clamp(max=0).exp_(), x + 1
    else:  # strided, each of the passes would take longer than the copy
        copy = x.contiguous()
        power, line = copy.clamp(max=0).exp_(), copy.add_(1)
    return torch.maximum(power, line, out=power)


def split_signs(x: Tensor, magnitude: Tensor) -> Tensor:
    """[magnitude where x > 0; magnitude where x < 0], 0 elsewhere; [..., D] -> [..., 2 D].

    Not `torch.where`, which on CPUs is a branch for each number: signs cannot be predicted.

    Args:
        x: Decides by its signs, [..., D].
        magnitude: At least 0, and 0 where x is, [..., D]; may be written to.
    """
    if not keeps_nothing():
        parts = magnitude * (x > 0), magnitude * (x < 0)  # autograd keeps masks of bytes
        return torch.cat(parts, dim=-1)
    signed = magnitude.copysign_(x)
    out = signed.new_empty(*signed.shape[:-1], 2, signed.shape[-1])
    torch.clamp(signed, min=0, out=out[..., 0, :])
    torch.clamp(signed.neg_(), min=0, out=out[..., 1, :])
    return out.flatten(-2)
