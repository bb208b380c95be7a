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
from .tracing import keeps_nothing, takes_functions


@dataclass(frozen=True)
class FeatureMap:
    """A feature map phi.

    Attributes:
        function: x [..., D] -> phi(x) [..., F]; with powers, x and powers -> phi(x).
        vjp: x [..., D] and the gradient of phi(x) [..., F] -> gradient of x [..., D]; with powers,
            x, the gradient and powers -> gradients of x and, for each x, of its power [..., D].
        expansion: F / D.
        takes_powers: Whether there are powers, one for each channel, in a shape that broadcasts to
            that of x.
    """

    function: Callable[..., Tensor]
    vjp: Callable[..., Any]
    expansion: int = 1
    takes_powers: bool = False

    def __call__(self, x: Tensor, powers: Tensor | None = None) -> Tensor:
        """phi(x); powers count where the map takes them."""
        return self.function(x, powers) if self.takes_powers else self.function(x)

    def pull_back(
        self, x: Tensor, grad: Tensor, powers: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of x and, for each x, of its power, from that of phi(x)."""
        if not self.takes_powers:
            return self.vjp(x, grad), None
        of_x, of_powers = self.vjp(x, grad, powers)
        return of_x, of_powers


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
    if takes_functions():
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


def _largest_feature(dtype: torch.dtype) -> float:
    """Where learned powers saturate, so that products of two features and values fit the type.

    float32: 3e14, which the 5th power of 790 reaches.
    """
    return float(torch.finfo(dtype).max) ** 0.375


def _plain_signed_powers(x: Tensor, powers: Tensor) -> Tensor:
    bound, base = _largest_feature(x.dtype) ** powers.reciprocal(), x.abs()
    if torch.is_grad_enabled() and not torch.jit.is_tracing():
        # In compiled programs; what saturates has no slope.
        inside = base <= bound
        base = torch.where(inside, base, bound.detach())
        powers = torch.where(inside, powers, powers.detach())
    else:
        base = torch.minimum(base, bound)
    return cpu.split_signs(x, _power(base, powers))


def _signed_powers_vjp(x: Tensor, grad: Tensor, powers: Tensor) -> tuple[Tensor, Tensor]:
    magnitude = x.abs()
    flat = (magnitude == 0) | (magnitude > _largest_feature(x.dtype) ** powers.reciprocal())
    magnitude = magnitude.masked_fill(flat, 1)  # NaN is neither
    grad_magnitude, grad_signed = _join_signs(x, grad)
    less = magnitude ** (powers - 1)
    of_x = grad_signed * (powers * less)
    of_powers = grad_magnitude * (magnitude * less * magnitude.log())
    return of_x.masked_fill(flat, 0), of_powers.masked_fill(flat, 0)


class _SignedPowers(torch.autograd.Function):
    """`signed_powers`, keeping x and the powers alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, powers: Tensor) -> Tensor:
        with torch.no_grad():
            return _plain_signed_powers(x, powers)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, powers = ctx.saved_tensors
        of_x, of_powers = _signed_powers_vjp(x, grad, powers)
        return of_x, of_powers.sum_to_size(powers.shape)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, of_powers: Tensor) -> Tensor:  # type: ignore[override]
        x, powers = ctx.saved_tensors
        ones = torch.ones_like(torch.cat((x, x), dim=-1))
        by_x, by_power = _signed_powers_vjp(x, ones, powers)
        change = torch.zeros_like(x)
        if tangent is not None:
            change = change + by_x * tangent
        if of_powers is not None:
            change = change + by_power * of_powers
        return torch.cat((change * (x > 0), change * (x < 0)), dim=-1)


def signed_powers(x: Tensor, powers: Tensor) -> Tensor:
    """Features of PolaFormer (arXiv:2501.15061), [..., D] -> [..., 2 D].

    [relu(x)^p; relu(-x)^p] with p > 0, elementwise; phi(-x) is phi(x) with its halves exchanged.
    Features of 0 are 0, as are their derivatives, by x and by p. Above 3e14 in float32 features
    stay there.

    Args:
        x: [..., h, N, D], or another shape that that of the powers broadcasts to.
        powers: p, such as [h, 1, D].
    """
    if takes_functions():
        out: Tensor = _SignedPowers.apply(x, powers)
        return out
    return _plain_signed_powers(x, powers)


def softmax_halves(x: Tensor) -> Tensor:
    """[softmax(x); softmax(-x)], each over the channels (arXiv:2402.04347), [..., D] -> [..., 2 D].

    It is the map of Hedgehog behind its matrix.
    """
    return torch.cat((x.softmax(-1), (-x).softmax(-1)), dim=-1)


def _softmax_halves_vjp(x: Tensor, grad: Tensor) -> Tensor:
    of_x = torch.zeros_like(x)
    for sign, half in zip((1, -1), grad.chunk(2, dim=-1), strict=True):
        share = (sign * x).softmax(-1)
        of_x = of_x + sign * share * (half - (half * share).sum(-1, keepdim=True))
    return of_x


FEATURE_MAPS = {
    "elu+1": FeatureMap(elu_plus_one, _elu_plus_one_vjp),
    "relu": FeatureMap(torch.relu, _relu_vjp),
    "identity": FeatureMap(_identity, _identity_vjp),
    "silu": FeatureMap(F.silu, _silu_vjp),
    "norm-aware": FeatureMap(norm_aware_query, _norm_aware_query_vjp, expansion=2),
    "cubed": FeatureMap(cubed_key, _cubed_key_vjp, expansion=2),
    "softmax-halves": FeatureMap(softmax_halves, _softmax_halves_vjp, expansion=2),
    "signed-powers": FeatureMap(signed_powers, _signed_powers_vjp, expansion=2, takes_powers=True),
}
