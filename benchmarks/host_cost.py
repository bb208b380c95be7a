"""Measures what Python and PyTorch take before the kernels of an attention have been launched.

    python benchmarks/host_cost.py --output benchmarks/results/host_cost_intel.json

Launches do nothing, so this needs no GPU: time runs from the call of `linear_attention` to its
return, forward, and backward from that of `torch.autograd.grad`; likewise of
`linear_attention_state` and of `read_linear_attention_state`. It is the least of many calls. What
Triton itself takes for a launch, and the driver, is not in it.

Each time is compared with that of an empty autograd function: it takes the same tensors, keeps them
for backward, allocates as many tensors of the same sizes, and launches nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout

from benchmarks.attention import commit, machine  # noqa: E402
from vitlinear import ops  # noqa: E402
from vitlinear.ops import backend  # noqa: E402

# Cut into splits on a GPU of `PROCESSORS`: more launches than small maps have.
BATCH, SIDE, HEADS, DIM = 2, 28, 2, 64
PROCESSORS = 132


class Cost(NamedTuple):
    """Microseconds of one call, forward or backward.

    Attributes:
        mechanism: Key in `vitlinear.ops.MECHANISMS`.
        call: ``attention``, ``state`` of keys and values, or ``read`` of a state.
        step: ``forward`` or ``backward``.
        launches: Kernels that are launched.
        ours: Microseconds.
        empty: Those of the empty function.
    """

    mechanism: str
    call: str
    step: str
    launches: int
    ours: float
    empty: float

    @property
    def ratio(self) -> float:
        """Ours over the empty function's."""
        return self.ours / self.empty


class NoDriver:
    """A driver of a GPU that is not there, as far as plans look at it."""

    def get_current_target(self) -> Any:
        """Hopper."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@dataclass
class Launched:
    """Kernels that were launched, as if.

    Attributes:
        names: Of each, while ``counting``.
        counting: Whether to count them, which takes time.
    """

    names: list[str] = field(default_factory=list)
    counting: bool = True


@contextmanager
def without_launches() -> Iterator[Launched]:
    """Inside, kernels take CPU tensors and do nothing."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from vitlinear.ops.triton import calls, tuning

    launched = Launched()

    def nothing(self: Any, *args: Any, **options: Any) -> None:
        if launched.counting:
            launched.names.append(self.__name__)

    with ExitStack() as stack:
        for owner, name, value in (
            (JITFunction, "run", nothing),
            (backend, "_interpreting", True),
            (calls, "processors", lambda device: PROCESSORS),
            (calls, "_prepared", {}),
            (tuning, "_chosen", {}),
            (driver, "_active", NoDriver()),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield launched


class Sizes(NamedTuple):
    """Numbers of float32 of each tensor that kernels are given besides inputs and outputs.

    Attributes:
        outputs: Their shapes where they are sums; none where there is one, like the first input.
        kept: Of those that forward leaves for backward.
        forward: Of the scratch memory of forward.
        backward: Of that of backward.
    """

    outputs: list[torch.Size]
    kept: list[int]
    forward: list[int]
    backward: list[int]


class Empty(torch.autograd.Function):
    """Allocates and keeps tensors, and computes nothing."""

    @staticmethod
    def forward(
        ctx: Any, sizes: Sizes, others: tuple[Tensor, ...], *tensors: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        """Outputs; others are kept as the tensors are, and have no gradient."""
        out: Any
        if sizes.outputs:
            out = tuple([torch.empty(shape, dtype=torch.float32) for shape in sizes.outputs])
        else:
            out = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
        kept = [torch.empty(size, dtype=torch.float32) for size in sizes.kept]
        for size in sizes.forward:
            torch.empty(size, dtype=torch.float32)
        ctx.save_for_backward(*tensors, *others, *kept)
        ctx.sizes, ctx.count = sizes.backward, len(tensors)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of the tensors."""
        saved = ctx.saved_tensors
        for size in ctx.sizes:
            torch.empty(size, dtype=torch.float32)
        form = torch.contiguous_format
        return None, None, *(torch.empty_like(x, memory_format=form) for x in saved[: ctx.count])


class Subject:
    """One attention with its epilogue, and the empty function beside it."""

    name = "attention"
    takes = ("q", "k", "v", "lepe", "gate", "powers")

    def __init__(self, mechanism: str, launched: Launched) -> None:
        """Make the tensors; inside of `without_launches`."""
        self.mechanism, self.launched = mechanism, launched
        row = ops.get_mechanism(mechanism)
        tables = ops.lrpe_tables if row.positions == "cosine" else ops.rotary_tables
        self.rotary = (
            None
            if row.positions == "none"
            else tables(
                SIDE,
                SIDE,
                DIM,
                dtype=torch.float16,  # as layers make them for a GPU
            )
        )
        powers = torch.ones(HEADS, DIM, requires_grad=True) if row.takes_powers else None
        projection = torch.zeros(BATCH, SIDE**2, 5, HEADS, DIM, dtype=torch.bfloat16)
        q, k, v, gate, lepe = (x.requires_grad_() for x in projection.unbind(2))
        given = {"q": q, "k": k, "v": v, "lepe": lepe, "gate": gate, "powers": powers}
        self.given: dict[str, Any] = {name: given[name] for name in self.takes}
        self.options: dict[str, Any] = {
            "mechanism": mechanism, "rotary": self.rotary, "backend": "triton"
        }  # fmt: skip
        self.leaves = self._leaves()
        outputs = self._outputs()
        self.grads = [torch.zeros_like(x) for x in outputs]
        self.sizes = self._sizes([x.shape for x in outputs])

    def _leaves(self) -> list[Tensor]:
        """All that gradients are computed of."""
        return [x for x in self.given.values() if x is not None]

    def _outputs(self) -> list[Tensor]:
        """All that the call returns, and has a gradient."""
        out = self.call()
        return [out] if isinstance(out, Tensor) else [x for x in out if x is not None]

    def _sizes(self, outputs: list[torch.Size]) -> Sizes:
        """Memory that the launches of a call are given besides."""
        from vitlinear.ops.triton import memory

        found: list[list[int]] = []
        vectors = memory.Layout.vectors

        def counted(layout: memory.Layout) -> tuple[Tensor | None, ...]:
            tensors = vectors(layout)
            found.append([x.numel() for x in tensors if x is not None])
            return tensors

        with mock.patch.object(memory.Layout, "vectors", counted):
            out = self.call()
            of_forward = len(found)
            self.differentiate(out)
        keeps = self.name == "attention"
        kept = found[0] if keeps else []
        scratch = sum(found[keeps:of_forward], [])
        sums = outputs if self.name == "state" else []
        return Sizes(sums, kept, scratch, sum(found[of_forward:], []))

    def call(self) -> Any:
        """Our forward pass."""
        return ops.linear_attention(**self.given, **self.options)

    def empty(self) -> Any:
        """The empty forward pass."""
        return Empty.apply(self.sizes, self.rotary or (), *self.leaves)

    def differentiate(self, out: Any) -> None:
        """The backward pass of either."""
        if not isinstance(out, Tensor):
            out = [x for x in out if x is not None]
        torch.autograd.grad(out, self.leaves, self.grads)

    def launches(self) -> tuple[int, int]:
        """Kernels that are launched forward and backward."""
        names, self.launched.counting = self.launched.names, True
        names.clear()
        out = self.call()
        of_forward = len(names)
        self.differentiate(out)
        self.launched.counting = False
        return of_forward, len(names) - of_forward

    def costs(self, calls: int) -> tuple[Cost, Cost]:
        """The least that forward and backward took in so many calls, by turns."""
        least: dict[tuple[str, str], float] = {}

        def timed(who: str, step: str, run: Callable[[], Any]) -> Any:
            start = time.perf_counter()
            result = run()
            took = 1e6 * (time.perf_counter() - start)
            least[who, step] = min(took, least.get((who, step), took))
            return result

        launches = dict(zip(("forward", "backward"), self.launches(), strict=True))
        for _ in range(calls):
            for who, run in (("ours", self.call), ("empty", self.empty)):
                out = timed(who, "forward", run)
                timed(who, "backward", lambda out=out: self.differentiate(out))
        forward, backward = (
            Cost(
                self.mechanism,
                self.name,
                step,
                launches[step],
                least["ours", step],
                least["empty", step],
            )
            for step in ("forward", "backward")
        )
        return forward, backward


class StateSubject(Subject):
    """The state of keys and values."""

    name = "state"
    takes = ("k", "v", "powers")

    def call(self) -> Any:
        """Our forward pass."""
        return ops.linear_attention_state(**self.given, **self.options)


class ReadSubject(Subject):
    """A read of a state, which has a gradient too."""

    name = "read"
    takes = ("q", "lepe", "gate", "powers")

    def _leaves(self) -> list[Tensor]:
        q = self.given["q"]
        row = ops.get_mechanism(self.mechanism)
        rows = row.state_dim(DIM, self.rotary is not None)
        shapes = {
            "state": (rows, DIM),
            "norm": (1, row.feature_dim(DIM)) if row.reads.uses_norm else None,
            "mean_v": (1, DIM) if row.reads.uses_mean else None,
        }
        sums = {
            name: torch.zeros(BATCH, HEADS, *shape, requires_grad=True)
            for name, shape in shapes.items()
            if shape is not None
        }
        self.given["state"] = ops.LinearAttentionState(**sums)
        others = [x for x in self.given.values() if isinstance(x, Tensor) and x is not q]
        return [q, *sums.values(), *others]

    def call(self) -> Any:
        """Our forward pass."""
        return ops.read_linear_attention_state(**self.given, **self.options)


def subjects(launched: Launched) -> Iterator[Subject]:
    """All calls of all mechanisms; inside of `without_launches`."""
    for name in ops.MECHANISMS:
        yield Subject(name, launched)
        if not ops.get_mechanism(name).has_global_query:
            yield StateSubject(name, launched)
        yield ReadSubject(name, launched)


def main() -> None:
    """Print a table and write one file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--output", type=Path, help="write the numbers there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with without_launches() as launched:
        costs = [cost for subject in subjects(launched) for cost in subject.costs(args.calls)]
    print("| mechanism | call | step | launches | us | us, empty function | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for cost in costs:
        print(
            f"| {cost.mechanism} | {cost.call} | {cost.step} | {cost.launches} | {cost.ours:.0f} | "
            f"{cost.empty:.0f} | {cost.ratio:.2f} |"
        )
    if args.output:
        record = {
            "command": " ".join(["python", "benchmarks/host_cost.py", *sys.argv[1:]]),
            "machine": machine(),
            "commit": commit(),
            "torch": torch.__version__,
            "rows": [cost._asdict() for cost in costs],
        }
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
