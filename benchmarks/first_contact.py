"""The kernels' first seconds on a GPU: are they right, and how long does each kernel take.

    python benchmarks/first_contact.py --output FILE.jsonl [--seconds 120]
    TRITON_INTERPRET=1 python benchmarks/first_contact.py --dry-run --output FILE.jsonl

One JSON line for each finding, flushed, so that whatever ends the script leaves those before it:
versions; then every mechanism in bfloat16 and float16, by one kernel and by splits, output and
gradients against the float64 formula; then the time of each kernel in the calls that a bar is set
for, with the bandwidth of a copy. The first line after the versions says how many kernels came from
a cache (`tools/gpu_cache.py`) and how many had to be compiled. The second command needs no GPU and
tries the script.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout

from benchmarks import gpu_rows  # noqa: E402
from benchmarks.gpu import Timer, copy_bandwidth, is_lost, machine  # noqa: E402
from vitlinear import ops  # noqa: E402
from vitlinear.ops import self_check  # noqa: E402
from vitlinear.ops.backend import find_obstacle  # noqa: E402
from vitlinear.ops.workload import Kind  # noqa: E402
from vitlinear.tune.calls import of_mechanism  # noqa: E402

# Grids for the paths: a window and a short map in one kernel, a long one in splits.
GRIDS = {"one kernel": (10, 12), "splits": (40, 41)}
DRY_GRIDS = {"one kernel": (3, 5)}
TERMS = ("rotary", "lepe", "gate")
RUNS = 10  # of a call, for the time of each kernel


class Check(NamedTuple):
    """One comparison: every term that models give, forward and backward."""

    kind: Kind
    path: str
    grid: tuple[int, int]


def checks(device: str, dry: bool) -> Iterator[Check]:
    """Every mechanism in both half types and on both paths; of a dry run in float32, on one."""
    types = (torch.float32,) if dry else (torch.bfloat16, torch.float16)
    shape = (1, 1, 1, 8 if dry else 64)
    for dtype in types:
        for mechanism in ops.MECHANISMS:
            call = of_mechanism(mechanism, shape, dtype, TERMS)
            kind = call._replace(device=device, device_index=None, training=True).kind
            for path, grid in (DRY_GRIDS if dry else GRIDS).items():
                yield Check(kind, path, grid)


def barred_shapes(dry: bool) -> list[gpu_rows.Shape]:
    """The calls that a bar is set for."""
    return list(gpu_rows.DRY_SHAPES[:1] if dry else gpu_rows.SHAPES[:8])


def correctness(check: Check) -> dict[str, Any]:
    """The errors of one comparison, and whether all are allowed."""
    kind, started = check.kind, time.monotonic()
    line: dict[str, Any] = {
        "check": kind.mechanism,
        "dtype": str(kind.dtype).removeprefix("torch."),
        "path": check.path,
    }
    if obstacle := find_obstacle(kind):
        return {**line, "right": None, "skipped": obstacle}
    try:
        found = self_check.compare(kind, check.grid)
    except Exception as error:  # a kernel that cannot run is a result
        return {**line, "right": False, "error": f"{type(error).__name__}: {error}"[:500]}
    line["right"] = all(each.error <= each.allowed for each in found)
    line["errors"] = {each.name: [each.error, each.allowed] for each in found}
    return {**line, "seconds": round(time.monotonic() - started, 3)}


def attention(
    shape: gpu_rows.Shape, device: torch.device, dtype: torch.dtype, compiled_only: bool = False
) -> Callable[[], Any]:
    """A forward and a backward pass of the kernels; on numbers, unless nothing will be launched."""
    parts = 5 if shape.epilogue else 3
    size = (shape.batch, shape.length, parts, shape.heads, shape.dim)
    if compiled_only:  # memory that is never touched costs nothing
        projection = torch.empty(size, device=device, dtype=dtype)
    else:
        projection = torch.randn(size, device=device, dtype=dtype)
    inputs = projection.requires_grad_().unbind(2)
    grad = torch.empty_like(inputs[0], memory_format=torch.contiguous_format)
    attend = gpu_rows.implementations(shape, device, dtype)["triton"]

    def both() -> object:
        return torch.autograd.grad(attend(*inputs), inputs, grad)

    return both


def kernel_times(shape: gpu_rows.Shape, device: torch.device, timer: Timer) -> dict[str, Any]:
    """Milliseconds of a forward and a backward pass together, and of each kernel in them."""
    line: dict[str, Any] = {"shape": shape.where, **shape._asdict(), "length": shape.length}
    both = attention(shape, device, torch.float32 if timer.dry else torch.bfloat16)
    line["both_ms"] = timer(both)
    if device.type == "cuda":
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as record:
            for _ in range(RUNS):
                both()
            torch.cuda.synchronize()
        line["kernels_ms"] = {
            event.key[:80]: [event.count / RUNS, event.self_device_time_total / RUNS / 1e3]
            for event in record.key_averages()
        }
    return line


class CacheCount:
    """How many kernels were found in Triton's cache, and how many were compiled."""

    def __init__(self) -> None:
        self.found = self.compiled = 0
        self.seconds = 0.0

    def listen(self) -> None:
        """Count from now on."""
        from triton import knobs

        knobs.compilation.listener = self

    def __call__(self, *, cache_hit: bool, times: Any, **_: Any) -> None:
        """Called by Triton after each kernel."""
        self.found += cache_hit
        self.compiled += not cache_hit

    def line(self) -> dict[str, Any]:
        """The counts so far."""
        return {"kernels_from_cache": self.found, "kernels_compiled": self.compiled}


def go_on(args: argparse.Namespace, number: int, left: float) -> None:
    """Continue behind a finding in a new process, which has a context of its own."""
    flags = ["--output", str(args.output), "--seconds", f"{left:.1f}", "--skip", str(number + 1)]
    os.execv(sys.executable, [sys.executable, __file__, *flags])


def main() -> None:
    """Find out what there is time for, one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="a JSON line for each finding")
    parser.add_argument("--seconds", type=float, default=120, help="begin nothing after these")
    parser.add_argument("--dry-run", action="store_true", help="tiny calls on the CPU")
    parser.add_argument("--skip", type=int, default=0, help="findings that are there already")
    args = parser.parse_args()
    start, device = time.monotonic(), torch.device("cpu" if args.dry_run else "cuda")
    count, timer = CacheCount(), Timer(args.dry_run)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with open(args.output, "a" if args.skip else "w", encoding="utf-8") as file:

        def tell(line: dict[str, Any]) -> None:
            text = json.dumps({"at": round(time.monotonic() - start, 2), **line})
            file.write(f"{text}\n")
            file.flush()
            print(text, flush=True)

        def bandwidth() -> dict[str, Any]:
            return {"copy_bytes_per_second": copy_bandwidth(device, timer)}

        tell(machine(device))
        if not args.dry_run:
            count.listen()
        findings: list[tuple[str, Callable[[], dict[str, Any]]]] = [
            *((x.kind.label, partial(correctness, x)) for x in checks(device.type, args.dry_run)),
            ("copy bandwidth", bandwidth),
            *(
                (shape.where, partial(kernel_times, shape, device, timer))
                for shape in barred_shapes(args.dry_run)
            ),
        ]
        finished = False
        try:
            for number, (name, find) in enumerate(findings[args.skip :], args.skip):
                left = args.seconds - (time.monotonic() - start)
                if left < 0:
                    break
                try:
                    tell(find())
                except Exception as error:
                    tell({"shape": name, "error": f"{type(error).__name__}: {error}"[:500]})
                if is_lost(device):  # after a bad access nothing runs any more in this process
                    tell({"context_lost": True, **count.line()})
                    go_on(args, number, left)
                if number == args.skip:
                    tell(count.line())
            else:
                finished = True
        except KeyboardInterrupt:
            tell({"interrupted": True})
        lines = map(json.loads, args.output.read_text(encoding="utf-8").splitlines())
        wrong = sum(line.get("right") is False for line in lines)
        tell({"finished": finished, "wrong": wrong, **count.line()})
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
