"""Inputs that the operator tests share."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from vitlinear import ops
from vitlinear.ops import naive
from vitlinear.ops.rotary import RotaryTables
from vitlinear.ops.terms import Terms

# Mechanisms that any layer can take: those without learned powers.
ANY_LAYER = [name for name, row in ops.MECHANISMS.items() if not row.takes_powers]
ATTENTIONS = (*ops.MECHANISMS, "softmax")
BACKENDS = ("eager", "library")


class Inputs(NamedTuple):
    """One projection [B, N, 4, h, D] of q, k, v and a gate, and the options.

    With an epilogue the projection has a fifth slice, lepe.
    """

    projection: Tensor
    rotary: RotaryTables | None
    mask: Tensor | None
    grad: Tensor
    cosine: RotaryTables | None = None  # the tables of mechanisms with the cosine encoding
    head_scale: Tensor | None = None
    epilogue: tuple[str, ...] = ()  # which of gate and lepe there are
    powers: Tensor | None = None  # of mechanisms that take them, where they are not as `powers_of`
    key_weights: Tensor | None = None  # likewise, where they are not as `weights_of`

    def tables(self, attention: str) -> RotaryTables | None:
        """Position tables of the kind that an attention takes."""
        if attention == "softmax":
            return self.rotary
        positions = ops.get_mechanism(attention).positions
        return {"rotary": self.rotary, "cosine": self.cosine, "none": None}[positions]

    def epilogue_terms(self, projection: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """lepe and gate, or None: lepe with channels first, as from a convolution."""
        if not self.epilogue:
            return None, None
        *_, gate, lepe = (self.projection if projection is None else projection).unbind(2)
        lepe = lepe.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return lepe if "lepe" in self.epilogue else None, gate if "gate" in self.epilogue else None

    def terms(self, attention: str, projection: Tensor | None = None) -> Terms:
        """All that an attention is given besides q, k and v."""
        lepe, gate = self.epilogue_terms(projection)
        powers = key_weights = None
        row = None if attention == "softmax" else ops.get_mechanism(attention)
        if row is not None and row.takes_powers:
            powers = powers_of(self.projection) if self.powers is None else self.powers
        if row is not None and row.takes_key_weights:
            key_weights = self.key_weights
            if key_weights is None:
                key_weights = weights_of(self.projection, attention)
        return Terms(
            self.tables(attention), self.mask, self.head_scale, lepe, gate, powers, key_weights
        )


def powers_of(projection: Tensor) -> Tensor:
    """Powers from 1 to 5, [h, D], which every type holds exactly."""
    heads, dim = projection.shape[-2:]
    dtype = torch.float64 if projection.dtype == torch.float64 else torch.float32
    powers = torch.linspace(1, 5, heads * dim, dtype=dtype, device=projection.device)
    return (8 * powers).round().view(heads, dim) / 8


def weights_of(projection: Tensor, mechanism: str) -> Tensor:
    """Weights of keys from 0 to 2, [B, N, h, 1 or F], which every type holds exactly."""
    numbers = ops.get_mechanism(mechanism).weights_per_key(projection.shape[-1])
    shape = (*projection.shape[:2], projection.shape[3], numbers)
    places = torch.arange(math.prod(shape), device=projection.device).reshape(shape)
    dtype = torch.float64 if projection.dtype == torch.float64 else torch.float32
    return (places * 7 % 17).to(dtype) / 8


def make_inputs(
    *,
    grid: tuple[int, int] = (3, 5),
    batch: int = 2,
    heads: int = 2,
    dim: int = 8,
    dtype: torch.dtype = torch.float64,
    rotary: bool = True,
    mask: bool = False,
    scale: float = 1.0,
    seed: int = 0,
    epilogue: tuple[str, ...] = (),
) -> Inputs:
    """Random inputs; the projection wants a gradient."""
    generator = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    projection = (
        (scale * normal(batch, n, 5 if epilogue else 4, heads, dim)).to(dtype).requires_grad_()
    )
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    tables = ops.rotary_tables(*grid, dim, dtype=table_dtype) if rotary else None
    cosine = ops.lrpe_tables(*grid, dim, dtype=table_dtype) if rotary else None
    padding = None
    if mask:
        padding = torch.zeros(batch, n, dtype=torch.bool)
        padding[0, n // 2 :] = True
        padding[-1, n // 3] = True
    grad = normal(batch, n, heads, dim).to(dtype)
    return Inputs(projection, tables, padding, grad, cosine, None, epilogue)


def attend(
    attention: str, inputs: Inputs, backend: str, projection: Tensor | None = None
) -> Tensor:
    """Run an attention; backend ``naive`` is the oracle."""
    projection = inputs.projection if projection is None else projection
    q, k, v, *_ = projection.unbind(2)
    tables = inputs.tables(attention)
    if attention == "softmax":
        if backend == "naive":
            return naive.softmax_attention(q, k, v, tables, inputs.mask)
        return ops.softmax_attention(
            q, k, v, rotary=tables, key_padding_mask=inputs.mask, backend=backend
        )
    terms = inputs.terms(attention, projection)
    if backend == "naive":
        return naive.linear_attention(q, k, v, attention, *terms)
    options = terms._asdict()
    return ops.linear_attention(q, k, v, mechanism=attention, **options, backend=backend)


def operator_arguments(attention: str, inputs: Inputs) -> tuple[OpOverload, tuple[Any, ...]]:
    """The registered forward operator and its arguments, without the backend."""
    q, k, v, *_ = inputs.projection.unbind(2)
    terms = inputs.terms(attention).flatten()
    if attention == "softmax":
        arguments = (q, k, v, terms.rows, terms.cols, terms.key_padding_mask)
        return torch.ops.vitlinear.softmax_attention.default, arguments
    return torch.ops.vitlinear.linear_attention.default, (q, k, v, attention, *terms)


def double(tables: RotaryTables | None) -> RotaryTables | None:
    """The same tables in float64."""
    return None if tables is None else RotaryTables(*(table.double() for table in tables))


def oracle(attention: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Output and gradient of the projection in float64."""
    projection = inputs.projection.detach().double().requires_grad_()
    inputs = inputs._replace(rotary=double(inputs.rotary), cosine=double(inputs.cosine))
    if inputs.head_scale is not None:
        inputs = inputs._replace(head_scale=inputs.head_scale.detach().double())
    if inputs.key_weights is not None:
        inputs = inputs._replace(key_weights=inputs.key_weights.detach().double())
    out = attend(attention, inputs, "naive", projection)
    return out, torch.autograd.grad(out, projection, inputs.grad.double())[0]
