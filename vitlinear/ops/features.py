"""Feature maps, which linear attention puts in the place of the exponential of q . k.

A map takes [..., D] to [..., F]. Beside each stands its vector-Jacobian product, for the
closed-form gradients of `vitlinear.ops.backward`; autograd uses the function alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu
from .tracing import keeps_nothing


@dataclass(frozen=True)
class FeatureMap:
    """A feature map phi.

    Attributes:
        function: x [..., D] -> phi(x) [..., F].
        vjp: x [..., D] and the gradient of phi(x) [..., F] -> gradient of x [..., D].
        expansion: F / D.
    """

    function: Callable[[Tensor], Tensor]
    vjp: Callable[[Tensor, Tensor], Tensor]
    expansion: int = 1


class _EluPlusOne(torch.autograd.Function):
    """elu(x) + 1, keeping its result alone: where that is below 1 it is the derivative too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return cpu.elu_plus_one(x)

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


def elu_plus_one(x: Tensor) -> Tensor:
    """``elu(x) + 1``: ``exp(x)`` for x <= 0, ``x + 1`` above (Katharopoulos et al., 2020)."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        out: Tensor = _EluPlusOne.apply(x)
        return out
    return cpu.elu_plus_one(x)


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


def _join_signs(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the magnitude, and the same with the sign of x, for `cpu.split_signs`."""
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
    vanishes = base == 0  # NaN does not
    zero = torch.zeros((), dtype=base.dtype, device=base.device)
    return torch.where(vanishes, zero, torch.where(vanishes, 1.0, base) ** exponent)


def norm_aware_query(x: Tensor) -> Tensor:
    """Norm-aware query features of NaLaFormer (arXiv:2506.21137), [..., D] -> [..., 2 D].

    With the direction u = q / |q| and the power p = 3 (0.5 + tanh |q|), elementwise:
    [relu(u)^p; relu(-u)^p]. A query of zeros has features of zeros.
    """
    norm, _, u = _direction(x)
    magnitude = _power(u.abs(), 3 * (0.5 + torch.tanh(norm)))
    return cpu.split_signs(u, magnitude)


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
    return cpu.split_signs(x, x.abs().pow(3))


def _cubed_key_vjp(x: Tensor, grad: Tensor) -> Tensor:
    return _join_signs(x, grad)[1] * (3 * x * x)


FEATURE_MAPS = {
    "elu+1": FeatureMap(elu_plus_one, _elu_plus_one_vjp),
    "relu": FeatureMap(torch.relu, _relu_vjp),
    "identity": FeatureMap(_identity, _identity_vjp),
    "silu": FeatureMap(F.silu, _silu_vjp),
    "norm-aware": FeatureMap(norm_aware_query, _norm_aware_query_vjp, expansion=2),
    "cubed": FeatureMap(cubed_key, _cubed_key_vjp, expansion=2),
}
