"""Time and memory of attention on a GPU, row by row of `gpu_rows`.

    python benchmarks/gpu.py --output FILE.json [--seconds 300] [--only mala --only triton]
    TRITON_INTERPRET=1 python benchmarks/gpu.py --dry-run --output FILE.json

The second line needs no GPU and tries the script. Times are medians of `triton.testing.do_bench`,
with the 20th and 80th percentile, the L2 cache flushed between runs; q, k and v are views of one
projection. ``graph`` times replay a captured CUDA graph, without the cost of launching. Copy
bandwidth is measured in the same run; a row's share of it counts the bytes that any implementation
has to move (`gpu_rows`), whatever was moved. Peak memory is what a call holds at its worst beyond
its inputs. What does not run is a row with the reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout

import vitlinear  # noqa: E402
from benchmarks import gpu_rows  # noqa: E402
from vitlinear.processor import cpu_model  # noqa: E402
from vitlinear.revision import source_commit  # noqa: E402

COPIED = 2**30  # bytes of the tensor that the copy bandwidth is measured with
# Tokens up to which every implementation is timed as a CUDA graph too: 14 x 14, and a class token.
LAUNCH_BOUND = 197

# What is aimed at (accounts/gpu.md).
FORWARD_SHARE, BACKWARD_SHARE, LARGE = 0.75, 0.65, 2**26  # of the copy bandwidth; bytes of q
OVER_COMPILED, OVER_TRANSCRIPTION = 2.5, 6  # times their speed, forward and backward together
AHEAD_FROM = 784  # tokens; of softmax attention


class Timer:
    """Medians with quantiles; of a single run, which measures nothing, in a dry run."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry

    def __call__(self, run: Callable[[], object]) -> list[float]:
        """Median, 20th and 80th percentile in milliseconds."""
        if self.dry:
            start = time.perf_counter()
            run()
            return [1e3 * (time.perf_counter() - start)] * 3
        from triton.testing import do_bench

        return list(do_bench(run, warmup=10, rep=60, quantiles=[0.5, 0.2, 0.8]))


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call holds at its worst beyond what was there before."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """A call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Calls(NamedTuple):
    """The calls that are timed of a row: forward, backward alone, and both."""

    forward: Callable[[], object]
    backward: Callable[[], object]
    both: Callable[[], object]


def calls_of(shape: gpu_rows.Shape, attend: Any, device: torch.device, dry: bool) -> Calls:
    """The calls of a row."""
    dtype = torch.float32 if dry else torch.bfloat16
    torch.manual_seed(0)
    parts = 5 if shape.epilogue else 3
    size = (shape.batch, shape.length, parts, shape.heads, shape.dim)
    qkv = torch.randn(size, device=device, dtype=dtype)
    grad = torch.randn((*size[:2], *size[3:]), device=device, dtype=dtype)

    def leaves() -> list[Tensor]:
        """Made where they are used: autograd goes back to the stream that made a tensor."""
        return [x.detach().requires_grad_() for x in qkv.unbind(2)]

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(*qkv.unbind(2))

    inputs = leaves()
    out = attend(*inputs)

    def backward() -> object:
        return torch.autograd.grad(out, inputs, grad, retain_graph=True)

    def both() -> object:
        own = leaves()
        return torch.autograd.grad(attend(*own), own, grad)

    return Calls(forward, backward, both)


def measure(calls: Calls, device: torch.device, timer: Timer) -> dict[str, Any]:
    """Times and memory of a row."""
    row: dict[str, Any] = {"forward_ms": timer(calls.forward), "backward_ms": timer(calls.backward)}
    row["both_ms"] = timer(calls.both)
    row["forward_peak_bytes"] = peak_memory(calls.forward, device)
    row["backward_peak_bytes"] = peak_memory(calls.backward, device)
    return row


def is_lost(device: torch.device) -> bool:
    """Whether the GPU's context is lost to this process: what runs next would fail as well."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def copy_bandwidth(device: torch.device, timer: Timer) -> float:
    """Bytes a second that a copy on the device reads and writes."""
    size = 2**16 if timer.dry else COPIED
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (timer(lambda: target.copy_(source))[0] * 1e-3)


def add_shares(row: dict[str, Any], shape: gpu_rows.Shape, bandwidth: float) -> None:
    """Fractions of the copy bandwidth that the least possible traffic would have needed."""
    forward, backward = (tensors * shape.tensor_bytes for tensors in shape.minimum())
    if row["implementation"] == "triton":
        ratios = [a / b for a, b in zip(shape.moved(), shape.minimum(), strict=True)]
        row["forward_moved_over_minimum"], row["backward_moved_over_minimum"] = ratios
    row["forward_bytes"], row["backward_bytes"] = forward, backward
    row["forward_share"] = forward / (row["forward_ms"][0] * 1e-3) / bandwidth
    row["backward_share"] = backward / (row["backward_ms"][0] * 1e-3) / bandwidth


def add_aims(rows: list[dict[str, Any]]) -> None:
    """Say in each row of the kernels which aims it meets, of those that were measured."""
    measured = [row for row in rows if "both_ms" in row]
    for row in measured:
        if row["implementation"] != "triton":
            continue
        fields = gpu_rows.Shape._fields
        shape = gpu_rows.Shape(*(row[field] for field in fields))
        speed = {
            other["implementation"]: other["both_ms"][0] / row["both_ms"][0]
            for other in measured
            if all(other[field] == row[field] for field in fields)
        }
        aims: dict[str, bool] = {}
        if shape.tensor_bytes >= LARGE:
            aims["forward"] = row["forward_share"] >= FORWARD_SHARE
            aims["backward"] = row["backward_share"] >= BACKWARD_SHARE
        if gpu_rows.COMPILED in speed:
            aims["compiled"] = speed[gpu_rows.COMPILED] >= OVER_COMPILED
        if "transcription" in speed:
            aims["transcription"] = speed["transcription"] >= OVER_TRANSCRIPTION
        softmax = [factor for name, factor in speed.items() if name.startswith("SDPA")]
        if softmax and shape.length >= AHEAD_FROM:
            aims["SDPA"] = min(softmax) > 1
        row["aims"] = aims


def verdict(aims: dict[str, bool]) -> str:
    """The aims of a row for people: those that it misses, or else meets; none was measured: ''."""
    missed = [name for name, met in aims.items() if not met]
    if missed:
        return f"misses {', '.join(missed)}"
    return f"meets {', '.join(aims)}" if aims else ""


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what this ran."""
    found: dict[str, Any] = {
        "device": cpu_model(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "vitlinear": vitlinear.__version__,
        "commit": source_commit() or "no checkout",
    }
    for package in ("triton", "timm"):
        if importlib.util.find_spec(package):
            found[package] = __import__(package).__version__
    # Has no operator that computes one of these mechanisms without a causal mask.
    found["flash-linear-attention"] = bool(importlib.util.find_spec("fla"))
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["processors"] = properties.multi_processor_count
        found["memory_GiB"] = round(properties.total_memory / 2**30, 1)
    return found


def test_results(files: list[Path]) -> dict[str, Any]:
    """Sums of the counts in pytest's JUnit files, and the names of what failed."""
    total = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    failed: list[str] = []
    for file in files:
        try:
            root = ElementTree.parse(file).getroot()
        except ElementTree.ParseError:  # of tests that were ended while they wrote it
            total["errors"] += 1
            failed.append(f"{file.name}: cut off")
            continue
        for suite in root.iter("testsuite"):
            for key in total:
                total[key] += int(suite.get(key, 0))
        failed += [
            f"{case.get('name')}: {problem.get('message', '')[:300]}"
            for case in root.iter("testcase")
            for problem in (*case.findall("failure"), *case.findall("error"))
        ]
    return {**total, "failed": failed}


def write(file: Path, record: dict[str, Any]) -> None:
    """Replace the result file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(file)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for people, with the aims that they meet; a star marks those with an epilogue."""
    header = f"{'mechanism':<12}{'B x N x h x D':<24}{'implementation':<26}"
    header += f"{'forward ms':>11}{'share':>7}{'backward ms':>13}{'share':>7}{'both ms':>10}  aims"
    lines = [header]
    for row in rows:
        size = " x ".join(str(row[key]) for key in ("batch", "length", "heads", "dim"))
        mechanism = row["mechanism"] + " *" * row["epilogue"]
        start = f"{mechanism:<12}{size:<24}{row['implementation']:<26}"
        if "error" in row:
            lines.append(start + row["error"][:60])
            continue
        times = (
            f"{row['forward_ms'][0]:>11.3f}{row['forward_share']:>7.0%}"
            f"{row['backward_ms'][0]:>13.3f}{row['backward_share']:>7.0%}{row['both_ms'][0]:>10.3f}"
        )
        lines.append(f"{start}{times}  {verdict(row.get('aims', {}))}".rstrip())
    return "\n".join(lines)


def main() -> None:
    """Measure what there is time for, print a table, write a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file for everything")
    parser.add_argument("--seconds", type=float, default=300, help="start no row after these")
    parser.add_argument("--tests", type=Path, nargs="*", default=[], help="JUnit files to record")
    parser.add_argument(
        "--only", action="append", default=[], help="mechanism or implementation; repeats"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    args = parser.parse_args()
    start, timer = time.monotonic(), Timer(args.dry_run)
    device = torch.device("cpu" if args.dry_run else "cuda")
    record: dict[str, Any] = {
        "dry_run": args.dry_run,
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(device),
        "tests": test_results(args.tests),
        "copy_bytes_per_second": copy_bandwidth(device, timer),
        "rows": [],
    }
    dtype = torch.float32 if args.dry_run else torch.bfloat16
    shapes = gpu_rows.DRY_SHAPES if args.dry_run else gpu_rows.SHAPES
    calls = [
        (shape, name, attend)
        for shape in shapes
        for name, attend in gpu_rows.implementations(shape, device, dtype).items()
        if not args.only or {shape.mechanism, name} & set(args.only)
    ]
    # Compiling a formula takes longer than measuring all else of its shape: last, in their order.
    calls.sort(key=lambda call: call[1] == gpu_rows.COMPILED)
    lost = False  # the context: after a bad access nothing runs any more

    def try_row(row: dict[str, Any], key: str, run: Callable[[], dict[str, Any]]) -> bool:
        """Adds what a run returns, or its error; returns whether it ran."""
        nonlocal lost
        if lost or time.monotonic() - start > args.seconds:
            row[key] = "skipped: " + ("the context is lost" if lost else "no time left")
            return False
        try:
            row |= run()
        except Exception as error:  # a kernel that cannot run this is a result
            row[key] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"
            lost = is_lost(device)
        write(args.output, record)  # whatever ends this early, what was measured is there
        return key not in row

    ran = []
    for shape, name, attend in calls:
        row = {**shape._asdict(), "length": shape.length, "implementation": name}
        record["rows"].append(row)

        def times(shape: gpu_rows.Shape = shape, attend: Any = attend) -> dict[str, Any]:
            return measure(calls_of(shape, attend, device, args.dry_run), device, timer)

        if try_row(row, "error", times):
            add_shares(row, shape, record["copy_bytes_per_second"])
            add_aims(record["rows"])
            print(table([row]).splitlines()[1], flush=True)
            ran.append((row, shape, name, attend))
        if name == gpu_rows.COMPILED:
            torch.compiler.reset()
    for row, shape, name, attend in ran:  # a capture that fails may leave nothing usable behind
        if device.type != "cuda" or not (name == "triton" or shape.length <= LAUNCH_BOUND):
            continue

        def graphs(shape: gpu_rows.Shape = shape, attend: Any = attend) -> dict[str, Any]:
            subject = calls_of(shape, attend, device, args.dry_run)
            return {
                "forward_graph_ms": timer(captured(subject.forward)),
                "both_graph_ms": timer(captured(subject.both)),
            }

        if not try_row(row, "graph_error", graphs):
            break
    record["seconds"] = time.monotonic() - start
    write(args.output, record)
    print(f"\n{table(record['rows'])}\n\nCopy: {record['copy_bytes_per_second'] / 1e12:.3f} TB/s")
    print(f"Tests: {record['tests']}\nWritten to {args.output}")


if __name__ == "__main__":
    main()
