"""The time of one attention call on the kernels, on the formula, and on the compiled formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitlinear.ops import (
    Workload,
    get_mechanism,
    linear_attention,
    linear_attention_state,
    read_linear_attention_state,
)
from vitlinear.ops.backend import describe_error
from vitlinear.ops.measurements import Measurement
from vitlinear.ops.self_check import device_of, make_terms

COPIED = 2**28  # bytes of the tensor that the bandwidth is measured with


def median_ms(run: Callable[[], object]) -> float:
    """Median time of a call on the GPU in milliseconds, with a cold L2 cache."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=50, return_mode="median"))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy on the device reads and writes."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / (1e-3 * median_ms(lambda: target.copy_(source)))


def least_bytes(work: Workload) -> int:
    """Bytes that any implementation of a call moves: each input and each result once.

    With one query for all keys (RALA) the queries, and in backward the gradient of the output or
    of the queries, are needed twice.
    """
    terms = work.kind.terms
    tensors = 4 + get_mechanism(work.mechanism).has_global_query
    tensors += ("lepe" in terms) + ("gate" in terms)
    if work.training:
        tensors += 7 + get_mechanism(work.mechanism).has_global_query
        if "gate" in terms:  # itself, its gradient, and lepe with its own
            tensors += 2 + 2 * ("lepe" in terms)
    size = torch.finfo(work.dtype).bits // 8
    weights = get_mechanism(work.mechanism).weights_per_key(work.head_dim)
    if work.training:  # once more, and their gradient
        weights *= 3
    return (tensors * work.head_dim + weights) * work.tokens * size


@dataclass(frozen=True)
class Timed:
    """The times of a call in milliseconds; None with the reason where there is none.

    Attributes:
        work: The call.
        milliseconds: By ``triton``, ``eager`` and ``compiled``; and of the kernels in two steps,
            ``states``, as streams and parallel processes call them.
        errors: Why one of these has no time.
    """

    work: Workload
    milliseconds: dict[str, float]
    errors: dict[str, str]

    def measurement(self) -> Measurement | None:
        """The row to keep; None where there is nothing to compare."""
        if not {"triton", "eager"} <= self.milliseconds.keys():
            return None
        work, kind = self.work, self.work.kind
        return Measurement(
            work.mechanism,
            str(work.dtype).removeprefix("torch."),
            work.head_dim,
            kind.terms,
            work.training,
            work.batch,
            work.length,
            work.heads,
            self.milliseconds["triton"],
            self.milliseconds["eager"],
            self.milliseconds.get("compiled"),
            work.value_dim,
            work.full_width,
            work.tf32,
        )

    def share(self, bandwidth: float) -> float | None:
        """Fraction of the copy bandwidth at which the kernels move the least bytes."""
        if "triton" not in self.milliseconds:
            return None
        return least_bytes(self.work) / (1e-3 * self.milliseconds["triton"]) / bandwidth


def time_call(work: Workload, implementations: tuple[str, ...]) -> Timed:
    """Time a call.

    Args:
        work: The call, with its device.
        implementations: Of ``triton``, ``states``, ``eager`` and ``compiled``.
    """
    timed = Timed(work, {}, {})
    for name in implementations:
        try:
            timed.milliseconds[name] = median_ms(_step(work, name))
        except torch.OutOfMemoryError:
            timed.errors[name] = "out of memory"
        except Exception as error:  # a kernel that cannot run this is a result
            timed.errors[name] = describe_error(error)
        if name == "compiled":
            torch.compiler.reset()
        if work.device == "cuda":
            torch.cuda.empty_cache()
    return timed


def _step(work: Workload, name: str) -> Callable[[], object]:
    """A forward pass, in training with a backward pass.

    Queries, keys, values and the gate are slices of one projection, unless values have another
    width; lepe, as from a convolution, and weights have memory of their own.
    """
    terms = make_terms(work.kind, *_grid(work.length), work.batch, work.heads)
    gated, width = terms.gate is not None, work.value_dim or work.head_dim

    def normal(slices: int, channels: int) -> Tensor:
        shape = (work.batch, work.length, slices, work.heads, channels)
        values = torch.randn(shape, dtype=work.dtype, device=device_of(work.kind))
        return values.requires_grad_(work.training)

    if width == work.head_dim:
        projections = [normal(3 + gated, width)]
    else:
        projections = [normal(2, work.head_dim), normal(1 + gated, width)]
    learnt = {
        key: value.requires_grad_(work.training)
        for key in ("lepe", "head_scale", "powers", "key_weights")
        if isinstance(value := getattr(terms, key, None), Tensor)
    }
    backend = "triton" if name in ("triton", "states") else "eager"

    def attend(projections: list[Tensor], learnt: dict[str, Tensor]) -> Tensor:
        q, k, v, *gate = [x for projection in projections for x in projection.unbind(2)]
        options: dict[str, Any] = {**terms._asdict(), **learnt}
        options["gate"] = gate[0] if gate else None
        if name == "states":
            return _in_two_steps(work.mechanism, q, k, v, options)
        return linear_attention(q, k, v, mechanism=work.mechanism, **options, backend=backend)

    call: Any = torch.compile(attend, dynamic=False) if name == "compiled" else attend
    if not work.training:

        def forward() -> Tensor:
            with torch.no_grad():
                return call(projections, learnt)

        forward()  # compiles, and says what is wrong
        return forward
    leaves = [*projections, *learnt.values()]
    grad = torch.randn_like(call(projections, learnt))

    def both() -> object:
        return torch.autograd.grad(call(projections, learnt), leaves, grad)

    both()
    return both


def has_states(work: Workload) -> bool:
    """Whether keys and values have a state without queries."""
    return not get_mechanism(work.mechanism).has_global_query


def _in_two_steps(
    mechanism: str, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
) -> Tensor:
    """The state of keys and values, and queries that read it."""
    key_weights = options.pop("key_weights")
    of_keys = {name: options[name] for name in ("rotary", "key_padding_mask", "powers")}
    of_keys["key_weights"] = key_weights
    state = linear_attention_state(k, v, mechanism=mechanism, **of_keys, backend="triton")
    return read_linear_attention_state(q, state, mechanism=mechanism, **options, backend="triton")


def _grid(length: int) -> tuple[int, int]:
    """The grid of so many tokens that is nearest to a square."""
    height = int(length**0.5)
    while length % height:
        height -= 1
    return height, length // height
