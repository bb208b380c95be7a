"""The kernels checked on the device in use against the formula in float64, once a kind of call.

Compilers, drivers and devices differ from those that the kernels were tested on, and a wrong result
is worse than a slow one. A few calls of two samples run the paths of windows, of short and of long
sequences. Output and gradients may err twice as much as the formula in the same type, and by what
one rounding of the result costs.

Nothing of it reaches the caller: no autograd, no random state, no hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backward, eager
from .backward import LinearGradients
from .mechanisms import MIXER_ROWS, Mechanism, get_mechanism
from .precision import accumulation_dtype
from .rotary import (
    RotaryTables,
    full_width_rotary_tables,
    kernel_table_dtype,
    lrpe_tables,
    rotary_tables,
)
from .terms import Terms
from .workload import Kind

# Grids of tokens: a window, a short sequence in one kernel, a long one in splits.
GRIDS = ((7, 7), (10, 12), (24, 25))
BATCH, HEADS = 2, 2
# One rounding of the result to the type: what even an exact kernel may add.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}
# Likewise of operands in TF32. The formula need not round them: cuBLAS decides for each product.
TF32_ROUNDING = 1e-3

Result = dict[str, Tensor]


def failure(kind: Kind) -> str | None:
    """The reason why the kernels are not to be used for calls of a kind; None if they passed.

    Raises:
        torch.OutOfMemoryError: The device has no memory for it now.
        Exception: A kernel does not compile or launch.
    """
    for grid in GRIDS:
        for found in compare(kind, grid):
            if not found.error <= found.allowed:  # NaN errs as well
                return (
                    f"error of the {found.name} {found.error:.1e} at {grid[0] * grid[1]} tokens, "
                    f"allowed {found.allowed:.1e}"
                )
    return None


class Deviation(NamedTuple):
    """The error of one result, relative to its norm, and the error that it may have."""

    name: str
    error: float
    allowed: float


def compare(kind: Kind, grid: tuple[int, int]) -> list[Deviation]:
    """Compare the output and, in training, each gradient on a grid of tokens; as `failure`."""
    row = get_mechanism(kind.mechanism)
    q, k, v, grad, terms = _inputs(kind, grid)
    with torch.no_grad(), eager.without_autocast(q):
        found = _run(_kernels(), q, k, v, row, terms, grad, kind.training)
        plain = _formula(q, k, v, row, terms, grad, kind.training)
        q, k, v, grad = (x.double() for x in (q, k, v, grad))
        exact = _formula(q, k, v, row, _doubled(terms), grad, kind.training)
    return [
        Deviation(
            name,
            _error(found[name], value),
            2 * _error(plain[name], value) + (TF32_ROUNDING if kind.tf32 else ROUNDING[kind.dtype]),
        )
        for name, value in exact.items()
    ]


def run_kernels(kind: Kind, grid: tuple[int, int]) -> Result:
    """Run the kernels of a kind of call on a grid of tokens: output and gradients by name."""
    q, k, v, grad, terms = _inputs(kind, grid)
    with torch.no_grad():
        return _run(_kernels(), q, k, v, get_mechanism(kind.mechanism), terms, grad, kind.training)


def _kernels() -> Any:
    from . import triton  # loads Triton itself

    return triton


def _inputs(kind: Kind, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor, Terms]:
    """Queries, keys, values, a gradient of the output, and terms, laid out as models have them."""
    generator = torch.Generator("cpu").manual_seed(0)
    length, dim = grid[0] * grid[1], kind.head_dim

    def normal(slices: int, width: int) -> tuple[Tensor, ...]:
        shape = (BATCH, length, slices, HEADS, width)
        values = torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")
        return values.to(device_of(kind), kind.dtype).unbind(2)

    if kind.value_dim:
        q, k = normal(2, dim)
        v, gate, lepe, grad = normal(4, kind.value_dim)
    else:
        q, k, v, gate, lepe, grad = normal(6, dim)
    if kind.mechanism in MIXER_ROWS:  # which divide by products that are to be positive
        q, k = q.abs(), k.abs()
    terms = make_terms(kind, *grid, BATCH, HEADS)
    if terms.lepe is not None:
        terms = terms._replace(lepe=lepe)
    if terms.gate is not None:
        terms = terms._replace(gate=gate)
    return q, k, v, grad, terms


def device_of(kind: Kind) -> torch.device:
    """The device of calls of a kind."""
    number = "" if kind.device_index is None else f":{kind.device_index}"
    return torch.device(kind.device + number)


def make_terms(kind: Kind, height: int, width: int, batch: int, heads: int) -> Terms:
    """Terms of a kind of call for a grid of tokens; lepe and gate are ones."""
    device, dim, length = device_of(kind), kind.head_dim, height * width
    cosine = get_mechanism(kind.mechanism).positions == "cosine"
    wide = full_width_rotary_tables if kind.full_width else rotary_tables
    tables = lrpe_tables if cosine else wide

    def mask() -> Tensor:
        padding = torch.zeros(batch, length, dtype=torch.bool, device="cpu")
        padding[0, length // 2 :] = True
        padding[-1, length // 3] = True
        return padding.to(device)

    def scale() -> Tensor:
        return torch.linspace(-1.5, 0.75, heads, dtype=torch.float32, device=device)

    def ones() -> Tensor:
        return torch.ones(
            batch, length, heads, kind.value_dim or dim, dtype=kind.dtype, device=device
        )

    def weights() -> Tensor:
        numbers = get_mechanism(kind.mechanism).weights_per_key(dim)
        some = torch.linspace(2, 0, batch * length * heads * numbers, dtype=kind.dtype)
        return some.view(batch, length, heads, numbers).to(device)

    made: dict[str, Callable[[], Any]] = {
        "rotary": lambda: tables(
            height,
            width,
            dim * (heads if kind.full_width else 1),
            device,
            kernel_table_dtype(kind.dtype),
        ),
        "key_padding_mask": mask,
        "head_scale": scale,
        "powers": lambda: torch.linspace(
            1, 3, heads * dim, dtype=torch.float32, device=device
        ).view(heads, dim),
        "lepe": ones,
        "gate": ones,
        "key_weights": weights,
    }
    return Terms(**{name: made[name]() for name in kind.terms})


def _doubled(terms: Terms) -> Terms:
    """The same terms in float64."""

    def double(x: Any) -> Any:
        if isinstance(x, RotaryTables):
            return RotaryTables(*map(double, x))
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return Terms(*map(double, terms))


def _run(
    kernels: Any, q: Tensor, k: Tensor, v: Tensor, row: Mechanism, terms: Terms, grad: Tensor,
    training: bool,
) -> Result:  # fmt: skip
    """Output and gradients by the kernels."""
    out, state = kernels.forward(q, k, v, row, terms)
    if not training:
        return {"output": out}

    def memory(*like: Tensor) -> tuple[Tensor, ...]:
        """Slices of one buffer, NaN until something is written."""
        shape = (*q.shape[:2], len(like), *like[0].shape[2:])
        return torch.full(shape, torch.nan, dtype=q.dtype, device=q.device).unbind(2)

    gated = terms.gate is not None
    values = (v, v) if gated else (v,)
    if v.shape == q.shape:
        grad_q, grad_k, grad_v, *grad_gate = memory(q, k, *values)
    else:
        (grad_q, grad_k), (grad_v, *grad_gate) = memory(q, k), memory(*values)
    grads = LinearGradients(
        grad_q,
        grad_k,
        grad_v,
        head_scale=None if terms.head_scale is None else torch.empty_like(terms.head_scale),
        lepe=torch.empty_like(v) if gated and terms.lepe is not None else None,
        gate=grad_gate[0] if gated else None,
        powers=None if terms.powers is None else torch.empty_like(terms.powers),
        key_weights=None if terms.key_weights is None else torch.empty_like(terms.key_weights),
    )
    kernels.backward(grad, q, k, v, row, terms, state, grads)
    return {"output": out, **dict(_named(grads))}


def _formula(
    q: Tensor, k: Tensor, v: Tensor, row: Mechanism, terms: Terms, grad: Tensor, training: bool
) -> Result:
    """The same by the closed formulas, in the type of the inputs."""
    tokens = eager.prepare(q, k, v, row, terms, own=True)
    out, state = eager.linear_attention_forward(tokens, row)
    result = {"output": eager.saturate(out.transpose(1, 2), q.dtype).to(q.dtype)}
    if not training:
        return result
    tokens = eager.prepare(q, k, v, row, terms, own=False)
    heads_first = grad.transpose(1, 2).to(accumulation_dtype(q.dtype))
    grads = backward.linear_attention_backward(heads_first, tokens, row, state)
    if terms.lepe is None:  # the formula has it wherever there is a gate
        grads = grads._replace(lepe=None)
    for name, value in _named(grads):
        if value.dim() == 4:
            value = eager.saturate(value.transpose(1, 2), q.dtype).to(q.dtype)
        result[name] = value
    return result


def _named(grads: LinearGradients) -> Iterator[tuple[str, Tensor]]:
    for name, value in grads._asdict().items():
        if value is not None:
            yield f"gradient of {name}", value


def _error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of the expected, or over 0.1 in each entry if larger."""
    floor = 0.1 * expected.numel() ** 0.5
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=floor))
