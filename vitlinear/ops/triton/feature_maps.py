"""Parts that kernels are made of: feature maps and factors of the read-out, with their derivatives.

Blocks of channels are those of `blocks`. Formulas are those of `vitlinear.ops.features` and
`mechanisms`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import beside, channel_lanes, halves, larger, smaller


@triton.jit
def _direction(x):
    """Norm, inverse norm and x / norm of tokens; see `features._direction`."""
    norm = tl.sqrt(tl.sum(x * x, 1))[:, None]
    inverse = 1.0 / larger(norm, 1.0842022e-19)  # root of the smallest normal number
    return norm, inverse, x * inverse


@triton.jit
def _power(base, exponent):
    """The power base ** exponent, 0 for base 0."""
    log = tl.log2(tl.where(base == 0, 1.0, base))
    return tl.where(base == 0, 0.0, tl.exp2(exponent * log))


@triton.jit
def _tanh(x):
    """tanh of x >= 0, to the rounding error of 1."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _split_signs(x, magnitude, plan: tl.constexpr):
    """[magnitude where x > 0; magnitude where x < 0]; see `cpu.split_signs`."""
    return beside(tl.where(x <= 0, 0.0, magnitude), tl.where(x >= 0, 0.0, magnitude), plan)


@triton.jit
def _join_signs(x, grad, plan: tl.constexpr):
    """Gradient of the magnitude, and the same with the sign of x; see `features._join_signs`."""
    positive, negative = halves(grad, plan)
    plus, minus = tl.where(x <= 0, 0.0, positive), tl.where(x >= 0, 0.0, negative)
    return plus + minus, plus - minus


@triton.jit
def _softmax(x, plan: tl.constexpr):
    """Softmax over the channels of a head, 0 in lanes beyond them."""
    _, exists = channel_lanes(plan.block_dim, plan)
    x = tl.where(exists[None, :], x, -float("inf"))
    power = tl.exp(x - tl.max(x, 1)[:, None])
    return power / tl.sum(power, 1)[:, None]


@triton.jit
def _softmax_vjp(x, grad, plan: tl.constexpr):
    """Gradient of x from that of its softmax."""
    share = _softmax(x, plan)
    return share * (grad - tl.sum(grad * share, 1)[:, None])


@triton.jit
def _power_bound(powers):
    """The largest |x| whose power does not saturate; see `features._largest_feature`."""
    return tl.exp2(48.0 / powers)  # float32's largest number to the power of 3/8


@triton.jit
def _feature_map(x, powers, name: tl.constexpr, plan: tl.constexpr):
    """The feature map of a name, [tokens, block_dim] -> [tokens, block_features]."""
    if name == "elu+1":
        _, exists = channel_lanes(plan.block_dim, plan)
        phi = tl.where(x > 0, x + 1.0, tl.exp(smaller(x, 0.0)))
        return tl.where(exists[None, :], phi, 0.0)  # elu(0) + 1 is no zero
    elif name == "relu":
        return larger(x, 0.0)
    elif name == "silu":
        return x * tl.sigmoid(x)
    elif name == "cubed":
        return _split_signs(x, tl.abs(x * x * x), plan)
    elif name == "signed-powers":
        base = smaller(tl.abs(x), _power_bound(powers)[None, :])
        return _split_signs(x, _power(base, powers[None, :]), plan)
    elif name == "norm-aware":
        norm, _, u = _direction(x)
        return _split_signs(u, _power(tl.abs(u), 3.0 * (0.5 + _tanh(norm))), plan)
    elif name == "softmax-halves":
        return beside(_softmax(x, plan), _softmax(-x, plan), plan)
    else:
        tl.static_assert(name == "identity")
        return x


@triton.jit
def _signed_powers_vjp(x, grad, powers, plan: tl.constexpr):
    """Gradients of x and, for each x, of its power; see `features._signed_powers_vjp`."""
    magnitude = tl.abs(x)
    flat = (magnitude == 0) | (magnitude > _power_bound(powers)[None, :])
    log = tl.log2(tl.where(flat, 1.0, magnitude))
    less = tl.exp2((powers - 1.0)[None, :] * log)
    grad_magnitude, grad_signed = _join_signs(x, grad, plan)
    of_x = grad_signed * (powers[None, :] * less)
    of_powers = grad_magnitude * (magnitude * less * (log * 0.6931471805599453))
    return tl.where(flat, 0.0, of_x), tl.where(flat, 0.0, of_powers)


@triton.jit
def _feature_map_vjp(x, grad, name: tl.constexpr, plan: tl.constexpr):
    """Gradient of x from that of phi(x)."""
    if name == "elu+1":
        return grad * tl.exp(smaller(x, 0.0))
    elif name == "relu":
        return tl.where(x <= 0, 0.0, grad)
    elif name == "silu":
        gate = tl.sigmoid(x)
        return grad * gate * (1.0 + x * (1.0 - gate))
    elif name == "cubed":
        _, signed = _join_signs(x, grad, plan)
        return signed * (3.0 * x * x)
    elif name == "softmax-halves":
        positive, negative = halves(grad, plan)
        return _softmax_vjp(x, positive, plan) - _softmax_vjp(-x, negative, plan)
    elif name == "norm-aware":
        norm, inverse, u = _direction(x)
        tanh = _tanh(norm)
        power = 3.0 * (0.5 + tanh)
        magnitude = tl.abs(u)
        log = tl.log2(tl.where(magnitude == 0, 1.0, magnitude))
        grad_magnitude, grad_signed = _join_signs(u, grad, plan)
        grad_u = grad_signed * power * _power(magnitude, power - 1.0)
        to_power = grad_magnitude * _power(magnitude, power) * (log * 0.6931471805599453)
        grad_power = tl.sum(to_power, 1)[:, None]
        along = tl.sum(u * grad_u, 1)[:, None]
        return (grad_u - u * along) * inverse + u * (3.0 * (1.0 - tanh * tanh) * grad_power)
    else:
        tl.static_assert(name == "identity")
        return grad


@triton.jit
def phi_q(x, powers, plan: tl.constexpr):
    """Features of queries."""
    name: tl.constexpr = plan.query_map
    return _feature_map(x, powers, name, plan)


@triton.jit
def phi_k(x, powers, plan: tl.constexpr):
    """Features of keys."""
    name: tl.constexpr = plan.key_map
    return _feature_map(x, powers, name, plan)


@triton.jit
def _pull_back(x, grad, powers, name: tl.constexpr, plan: tl.constexpr):
    """Gradients of x and, for each x, of its power, from that of phi(x)."""
    if name == "signed-powers":
        return _signed_powers_vjp(x, grad, powers, plan)
    else:
        return _feature_map_vjp(x, grad, name, plan), 0.0


@triton.jit
def phi_q_vjp(x, grad, powers, plan: tl.constexpr):
    """Gradients of queries and powers from that of the features of queries."""
    name: tl.constexpr = plan.query_map
    return _pull_back(x, grad, powers, name, plan)


@triton.jit
def phi_k_vjp(x, grad, powers, plan: tl.constexpr):
    """Gradients of keys and powers from that of the features of keys."""
    name: tl.constexpr = plan.key_map
    return _pull_back(x, grad, powers, name, plan)


@triton.jit
def _away_from_zero(z):
    """z with a magnitude of at least 1e-6, the sign kept; see `mechanisms._away_from_zero`."""
    return tl.where(z < 0.0, smaller(z, -1e-6), larger(z, 1e-6))


@triton.jit
def read_factors(z, scale, count, plan: tl.constexpr):
    """The factors a and b of the formula; see `vitlinear.ops.mechanisms`."""
    if plan.read_out == "normalised":
        return 1.0 / (z + 1e-6), tl.zeros_like(z)
    elif plan.read_out == "magnitude-aware":
        return scale + scale / (scale * z + 1e-6), -scale * z
    elif plan.read_out == "injective":
        return tl.zeros_like(z) + scale, 1.0 - scale * z
    elif plan.read_out == "clamped":
        return count / larger(count * z, 100.0), tl.zeros_like(z)
    elif plan.read_out == "smoothed":
        return 1.0 / (z + 1e-4), tl.zeros_like(z)
    elif plan.read_out == "signed":
        return 1.0 / _away_from_zero(z), tl.zeros_like(z)
    else:
        tl.static_assert(plan.read_out == "constant")
        return tl.zeros_like(z) + 1.0, tl.zeros_like(z)


@triton.jit
def read_slopes(z, scale, count, plan: tl.constexpr):
    """Derivatives of a and b by z."""
    zero = tl.zeros_like(z)
    if plan.read_out == "normalised":
        inverse = 1.0 / (z + 1e-6)
        return -inverse * inverse, zero
    elif plan.read_out == "magnitude-aware":
        ratio = scale / (scale * z + 1e-6)
        return -ratio * ratio, zero - scale
    elif plan.read_out == "injective":
        return zero, zero - scale
    elif plan.read_out == "clamped":
        total = count * z
        ratio = count / larger(total, 100.0)
        return tl.where(total < 100.0, 0.0, -ratio * ratio), zero
    elif plan.read_out == "smoothed":
        inverse = 1.0 / (z + 1e-4)
        return -inverse * inverse, zero
    elif plan.read_out == "signed":
        bounded = _away_from_zero(z)
        return tl.where(bounded == z, -1.0 / (bounded * bounded), 0.0), zero
    else:
        return zero, zero
