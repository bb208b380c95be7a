"""Feature maps: what a linear attention puts in the place of the exponential of q . k.

A map takes [..., D] to [..., F]. Beside each stands its vector-Jacobian product, for the
closed-form gradients of `vitlinear.ops.backward`; autograd uses the function alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .tracing import wants_common_operators

LOG2_E = math.log2(math.e)


def keeps_nothing() -> bool:
    """Whether a new tensor may be written to again: no gradient wants it, nobody traces."""
    return not (
        torch.is_grad_enabled() or torch.compiler.is_compiling() or wants_common_operators()
    )


@dataclass(frozen=True)
class FeatureMap:
    """A feature map phi.

    Attributes:
        function: x [..., D] -> phi(x) [..., F].
        vjp: x [..., D] and the gradient of phi(x) [..., F] -> gradient of x [..., D].
        expansion: F / D.
        makes_new: phi(x) is a new tensor, and not x itself.
    """

    function: Callable[[Tensor], Tensor]
    vjp: Callable[[Tensor, Tensor], Tensor]
    expansion: int = 1
    makes_new: bool = True


class _EluPlusOne(torch.autograd.Function):
    """elu(x) + 1, keeping its result alone: where that is below 1 it is the derivative too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _elu_plus_one(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (features,) = ctx.saved_tensors
        return grad * features.clamp(max=1)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # type: ignore[override]
        (features,) = ctx.saved_tensors
        return tangent * features.clamp(max=1)


def _elu_plus_one(x: Tensor) -> Tensor:
    if x.device.type != "cpu" or wants_common_operators():
        return F.elu(x.contiguous()).add_(1)
    # On CPUs elu takes twice as long as these passes, and takes from exp(x) the 1 that is added
    # again: a float32 result is off by 4e-6 of itself at x = -5 and by all of it at -30, where this
    # is off by 3e-7 and 2e-6. exp(x) >= x + 1, equal at 0.
    if x.is_contiguous():
        line = x + 1
        power = x.clamp(max=0)
    else:  # strided, each of them would take longer than the copy
        line = x.contiguous()
        power = line.clamp(max=0)
        line.add_(1)
    if x.dtype == torch.float32:
        power.mul_(LOG2_E).exp2_()  # faster than exp, which is MKL's
    else:
        power.exp_()
    return torch.maximum(power, line, out=power)


def elu_plus_one(x: Tensor) -> Tensor:
    """``elu(x) + 1``: ``exp(x)`` for x <= 0, ``x + 1`` above (Katharopoulos et al., 2020)."""
    if torch.compiler.is_compiling():
        if torch.is_grad_enabled() or wants_common_operators():
            return F.elu(x) + 1
        # For CPUs inductor computes elu anew in each loop that reads it, but an exponential once.
        return x.clamp(max=0).exp() + x.clamp(min=0)
    if torch.is_grad_enabled():
        out: Tensor = _EluPlusOne.apply(x)
        return out
    return _elu_plus_one(x)


def _elu_plus_one_vjp(x: Tensor, grad: Tensor) -> Tensor:
    return grad * torch.exp(x.clamp(max=0))


def _relu_vjp(x: Tensor, grad: Tensor) -> Tensor:
    return grad.masked_fill(x <= 0, 0)  # 0 at 0, as in PyTorch; infinity times 0 is none


def _identity(x: Tensor) -> Tensor:
    return x


def _identity_vjp(x: Tensor, grad: Tensor) -> Tensor:
    return grad


def _silu_vjp(x: Tensor, grad: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return grad * gate * (1 + x * (1 - gate))


def split_signs(x: Tensor, magnitude: Tensor) -> Tensor:
    """[magnitude where x > 0; magnitude where x < 0], twice as wide as x and 0 elsewhere."""
    # Not `where`, which on CPUs is a branch for each number: signs cannot be predicted.
    parts = magnitude * (x > 0), magnitude * (x < 0)  # autograd keeps masks of bytes
    return torch.cat(parts, dim=-1)


def _split_signs_of(x: Tensor) -> Tensor:
    """[relu(x); relu(-x)], twice as wide as x, which is written to."""
    out = x.new_empty(*x.shape[:-1], 2, x.shape[-1])
    torch.clamp(x, min=0, out=out[..., 0, :])
    torch.clamp(x.neg_(), min=0, out=out[..., 1, :])
    return out.flatten(-2)


def _join_signs(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the magnitude, and the same with the sign of x, for `split_signs`."""
    positive, negative = grad.chunk(2, dim=-1)
    plus, minus = positive.masked_fill(x <= 0, 0), negative.masked_fill(x >= 0, 0)
    return plus + minus, plus - minus


def _direction(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Norm of x, inverse norm, and x / norm; 0 / 0 is 0.

    Below the root of the smallest normal number the square of the norm underflows: there, and only
    there, the direction is shorter than one.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = norm.clamp(min=torch.finfo(x.dtype).tiny ** 0.5).reciprocal()
    return norm, inverse, x * inverse


def _power(base: Tensor, exponent: Tensor) -> Tensor:
    """base ** exponent, base >= 0, exponent > 0; 0 ** exponent is 0 with all of its derivatives."""
    if keeps_nothing():
        return base.pow(exponent)
    positive = base > 0
    zero = torch.zeros((), dtype=base.dtype, device=base.device)
    return torch.where(positive, torch.where(positive, base, 1.0) ** exponent, zero)


def norm_aware_query(x: Tensor) -> Tensor:
    """Norm-aware query features of NaLaFormer (arXiv:2506.21137), [..., D] -> [..., 2 D].

    With the direction u = q / |q| and the power p = 3 (0.5 + tanh |q|), elementwise:
    [relu(u)^p; relu(-u)^p]. A query of zeros has features of zeros.
    """
    norm, _, u = _direction(x)
    magnitude = _power(u.abs(), 3 * (0.5 + torch.tanh(norm)))
    if keeps_nothing():
        return _split_signs_of(magnitude.copysign_(u))
    return split_signs(u, magnitude)


def _norm_aware_query_vjp(x: Tensor, grad: Tensor) -> Tensor:
    norm, inverse, u = _direction(x)
    tanh = torch.tanh(norm)
    power = 3 * (0.5 + tanh)
    magnitude = u.abs()
    grad_magnitude, grad_signed = _join_signs(u, grad)
    grad_u = grad_signed * power * _power(magnitude, power - 1)
    log = torch.where(magnitude > 0, magnitude, 1.0).log()
    grad_power = (grad_magnitude * _power(magnitude, power) * log).sum(-1, keepdim=True)
    along = (u * grad_u).sum(-1, keepdim=True)
    return (grad_u - u * along) * inverse + u * (3 * (1 - tanh * tanh) * grad_power)


def cubed_key(x: Tensor) -> Tensor:
    """Key features of NaLaFormer, [relu(k^3); relu(-k^3)], [..., D] -> [..., 2 D]."""
    return _split_signs_of(x.pow(3)) if keeps_nothing() else split_signs(x, x.abs().pow(3))


def _cubed_key_vjp(x: Tensor, grad: Tensor) -> Tensor:
    return _join_signs(x, grad)[1] * (3 * x * x)


FEATURE_MAPS = {
    "elu+1": FeatureMap(elu_plus_one, _elu_plus_one_vjp),
    "relu": FeatureMap(torch.relu, _relu_vjp),
    "identity": FeatureMap(_identity, _identity_vjp, makes_new=False),
    "silu": FeatureMap(F.silu, _silu_vjp),
    "norm-aware": FeatureMap(norm_aware_query, _norm_aware_query_vjp, expansion=2),
    "cubed": FeatureMap(cubed_key, _cubed_key_vjp, expansion=2),
}
