"""Time and memory of attention on this machine: our backends against a direct transcription.

    python benchmarks/attention.py [--threads 2] [--batch 8] [--malloc keep] [--output NAME.json]

The transcription computes RALA step by step as its definition reads, one PyTorch call for each
step, heads moved before tokens by a copy: what a script written from the paper does. Every row is
the attention alone, q, k, v being views of one projection as in the models. Times are medians;
memory is read from the allocator's own record in PyTorch's profiler: ``kept`` is what stays from
forward until backward besides the output, ``peak`` the most that a forward and backward hold.

PyTorch has no caching allocator on CPUs: glibc returns freed memory to the system and every call
pays for page faults anew, which on some virtual machines is most of its time. ``--malloc keep``
(the default) tells glibc not to, as an allocator preloaded in production would; ``--malloc
default`` measures what an untuned process sees.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout

import vitlinear  # noqa: E402
from benchmarks.transcription import rala  # noqa: E402
from vitlinear import ops  # noqa: E402
from vitlinear.benchmark.turns import KEEP_PAGES  # noqa: E402
from vitlinear.processor import cpu_model  # noqa: E402
from vitlinear.revision import git  # noqa: E402

# (tokens on a side, heads, head_dim): stages 1 to 3 of ravlt_t at 224 x 224.
SHAPES = ((56, 1, 64), (28, 2, 64), (14, 4, 64))
DTYPES = (torch.float32, torch.bfloat16)


def rala_transcribed(q: Tensor, k: Tensor, v: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """RALA step by step; [B, N, h, D] -> [B, N, h, D]."""
    q, k, v = (x.permute(0, 2, 1, 3).contiguous() for x in (q, k, v))
    return rala(q, k, v, sin, cos).permute(0, 2, 1, 3).contiguous()


def median_seconds(run: Callable[[], object], seconds: float = 2.0) -> float:
    """Median time of a call, warmed up, over at least five calls and the given time."""
    run()
    run()
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def held_bytes(run: Callable[[], object]) -> tuple[int, int]:
    """Memory that a call still holds when it returns, and the most that it held at once."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = run()  # keeps what it refers to alive until the record is closed
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    del result
    return held, peak


def machine() -> str:
    """The processor's name, as far as the system tells it, and its cores."""
    return f"{cpu_model()}, {os.cpu_count()} cores"


def commit() -> str:
    """The commit measured, with ``-dirty`` where the tree differs from it, results left out."""
    root = Path(__file__).resolve().parent.parent
    described = git(root, "describe", "--always") or b""
    same = git(root, "diff", "--quiet", "HEAD", "--", ".", ":(exclude)benchmarks/results")
    return described.decode().strip() + ("-dirty" if same is None else "")


def measure(
    side: int, heads: int, dim: int, batch: int, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Rows for one shape: every implementation, forward and forward + backward."""
    torch.manual_seed(0)
    n = side * side
    qkv = torch.randn(batch, n, 3, heads, dim).to(dtype)
    grad = torch.randn(batch, n, heads, dim).to(dtype)
    rotary = ops.rotary_tables(side, side, dim)
    table = ops.rotary.token_table(rotary)
    cos, sin = (t.repeat_interleave(2, dim=-1).to(dtype) for t in table.unbind(-1))

    implementations: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "transcription": lambda q, k, v: rala_transcribed(q, k, v, sin, cos),
        "eager": lambda q, k, v: ops.linear_attention(
            q, k, v, mechanism="rala", rotary=rotary, backend="eager"
        ),
        "library": lambda q, k, v: ops.linear_attention(
            q, k, v, mechanism="rala", rotary=rotary, backend="library"
        ),
        "softmax (SDPA)": lambda q, k, v: ops.softmax_attention(
            q, k, v, rotary=rotary, backend="eager"
        ),
    }
    rows = []
    for name, attend in implementations.items():
        leaf = qkv.clone().requires_grad_()

        def forward(attend=attend) -> Tensor:
            with torch.no_grad():
                return attend(*qkv.unbind(2))

        def train(attend=attend, leaf=leaf) -> Tensor:
            return torch.autograd.grad(attend(*leaf.unbind(2)), leaf, grad)[0]

        def keep(attend=attend, leaf=leaf) -> Tensor:
            return attend(*leaf.unbind(2))

        rows.append(
            {
                "implementation": name,
                "batch": batch,
                "N": n,
                "heads": heads,
                "head_dim": dim,
                "dtype": str(dtype).removeprefix("torch."),
                "forward_ms": 1e3 * median_seconds(forward),
                "train_ms": 1e3 * median_seconds(train),
                "kept_MiB": (held_bytes(keep)[0] - grad.nbytes) / 2**20,
                "peak_MiB": held_bytes(train)[1] / 2**20,
            }
        )
    return rows


def main() -> None:
    """Measure, print a table of ratios, write a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    parser.add_argument("--malloc", choices=("keep", "default"), default="keep")
    args = parser.parse_args()
    if args.malloc == "keep" and not KEEP_PAGES.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_PAGES})
    torch.set_num_threads(args.threads)

    rows = []
    columns = ("forward_ms", "train_ms", "kept_MiB", "peak_MiB")
    print("In brackets: transcription / this row, so above 1 is better.")
    print(f"{'dtype':<9}{'N':>5} {'implementation':<15}" + "".join(f"{c:>18}" for c in columns))
    for dtype, (side, heads, dim) in itertools.product(DTYPES, SHAPES):
        shape_rows = measure(side, heads, dim, args.batch, dtype)
        for row in shape_rows:
            cells = [f"{row[c]:9.2f} ({shape_rows[0][c] / row[c]:6.2f})" for c in columns]
            print(
                f"{row['dtype']:<9}{row['N']:>5} {row['implementation']:<15}"
                + "".join(f"{c:>18}" for c in cells),
                flush=True,
            )
        rows += shape_rows
    if args.output:
        record = {
            "command": f"python benchmarks/attention.py --threads {args.threads} "
            f"--batch {args.batch} --malloc {args.malloc}",
            "machine": f"{machine()}; {args.threads} threads used",
            "commit": commit(),
            "torch": torch.__version__,
            "vitlinear": vitlinear.__version__,
            "rows": rows,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
