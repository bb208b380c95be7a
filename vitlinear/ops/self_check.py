"""The kernels checked on the device in use against the formula in float64, once a kind of call.

Compilers, drivers and devices differ from those that the kernels were tested on, and a wrong result
is worse than a slow one. A few calls of two samples run the paths of windows, of short and of long
sequences. Output and gradients may err twice as much as the formula in the same type, and by what
one rounding of the result costs.

Nothing of it reaches the caller: no autograd, no random state, no hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import backward, eager
from .backward import LinearGradients
from .mechanisms import Mechanism, get_mechanism
from .rotary import RotaryTables, lrpe_tables, rotary_tables
from .terms import Terms
from .workload import Kind

# Grids of tokens: a window, a short sequence in one kernel, a long one in splits.
GRIDS = ((7, 7), (10, 12), (24, 25))
BATCH, HEADS = 2, 2
# One rounding of the result to the type: what even an exact kernel may add.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}

Result = dict[str, Tensor]


def failure(kind: Kind) -> str | None:
    """The reason why the kernels are not to be used for calls of a kind; None if they passed.

    Raises:
        torch.OutOfMemoryError: The device has no memory for it now.
        Exception: A kernel does not compile or launch.
    """
    with torch.no_grad():
        for grid in GRIDS:
            worst = _compare(kind, grid)
            if worst is not None:
                return worst
    return None


def _compare(kind: Kind, grid: tuple[int, int]) -> str | None:
    """The first result on a grid that errs too much, in words."""
    row = get_mechanism(kind.mechanism)
    q, k, v, grad, terms = _inputs(kind, grid)
    with eager.without_autocast(q):
        found = _run(_kernels(), q, k, v, row, terms, grad, kind.training)
        plain = _formula(q, k, v, row, terms, grad, kind.training)
        q, k, v, grad = (x.double() for x in (q, k, v, grad))
        exact = _formula(q, k, v, row, _doubled(terms), grad, kind.training)
    for name, value in exact.items():
        error = _error(found[name], value)
        allowed = 2 * _error(plain[name], value) + ROUNDING[kind.dtype]
        if not error <= allowed:  # NaN errs as well
            return f"error of the {name} {error:.1e} at {grid[0] * grid[1]} tokens, " + (
                f"allowed {allowed:.1e}"
            )
    return None


def _kernels() -> Any:
    from . import triton  # loads Triton itself

    return triton


def _inputs(kind: Kind, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor, Terms]:
    """Queries, keys, values, a gradient of the output, and terms, laid out as models have them."""
    generator = torch.Generator("cpu").manual_seed(0)
    length, dim = grid[0] * grid[1], kind.head_dim
    shape = (BATCH, length, 6, HEADS, dim)
    values = torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")
    q, k, v, gate, lepe, grad = values.to(device_of(kind), kind.dtype).unbind(2)
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
    tables = lrpe_tables if cosine else rotary_tables

    def mask() -> Tensor:
        padding = torch.zeros(batch, length, dtype=torch.bool, device="cpu")
        padding[0, length // 2 :] = True
        padding[-1, length // 3] = True
        return padding.to(device)

    def scale() -> Tensor:
        return torch.linspace(-1.5, 0.75, heads, dtype=torch.float32, device=device)

    def ones() -> Tensor:
        return torch.ones(batch, length, heads, dim, dtype=kind.dtype, device=device)

    made: dict[str, Callable[[], Any]] = {
        "rotary": lambda: tables(height, width, dim, device),
        "key_padding_mask": mask,
        "head_scale": scale,
        "powers": lambda: torch.linspace(1, 3, heads * dim, device=device).view(heads, dim),
        "lepe": ones,
        "gate": ones,
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
    gated = terms.gate is not None
    memory = torch.full((*q.shape[:2], 4, *q.shape[2:]), torch.nan, dtype=q.dtype, device=q.device)
    grads = LinearGradients(
        memory[:, :, 0],
        memory[:, :, 1],
        memory[:, :, 2],
        head_scale=None if terms.head_scale is None else torch.empty_like(terms.head_scale),
        lepe=torch.empty_like(q) if gated and terms.lepe is not None else None,
        gate=memory[:, :, 3] if gated else None,
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
    heads_first = grad.transpose(1, 2).to(eager.accumulation_dtype(q.dtype))
    grads = backward.linear_attention_backward(heads_first, tokens, row, state)
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
