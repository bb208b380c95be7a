"""Time and memory of every attention of the registry by the number of tokens, on a CPU.

    python benchmarks/mixers.py                   # on a quiet machine; under 10 minutes for all
    python benchmarks/mixers.py --only mala elu   # measures these anew, keeps the others

A row is one layer of `vitlinear.create_attention` with 192 channels in 3 heads, on one map in
float32: a forward pass without gradients, a forward and backward pass, and the most memory that the
latter holds. Attentions that refuse so many tokens have no row. Results go to
``results/mixers_cpu.json`` and ``results/mixers_cpu.svg``; then ``python tools/make_mixers.py``
writes them into docs/mixers.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout

from benchmarks.attention import KEEP_PAGES, commit, held_bytes, machine  # noqa: E402
from vitlinear.files import write_atomically  # noqa: E402
from vitlinear.mixers import (  # noqa: E402
    AttentionSpec,
    attention_of_spec,
    describe_attention,
    list_attentions,
    split_spec,
)

RESULTS = Path(__file__).resolve().parent / "results"
SIDES = (14, 28, 56, 128)  # of maps of 196, 784, 3136 and 16384 tokens
DIM, HEADS = 192, 3


def scans() -> dict[str, AttentionSpec]:
    """Forms of attentions that scan the map in several directions, by a name for each."""
    return {
        f"{name}_{form}": {"name": name, "form": form}
        for name in list_attentions()
        if "form" in (options := describe_attention(name).options)
        for form in options["form"].choices
        if form.startswith("scans")
    }


def specs() -> dict[str, AttentionSpec]:
    """All that is measured: each attention with its usual options, and the scans."""
    return {**{name: name for name in list_attentions()}, **scans()}


def median(run: Callable[[], object], least: int, seconds: float) -> float:
    """Median time of a call that has run before, over at least so many and so much time."""
    times: list[float] = []
    while len(times) < least or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(name: str, side: int, seconds: float) -> dict[str, Any] | None:
    """A row for an attention on a square map; None where it refuses so many tokens."""
    spec = specs()[name]
    most = describe_attention(split_spec(spec)[0]).most_tokens
    if most is not None and side * side > most:
        return None
    torch.manual_seed(0)
    layer = attention_of_spec(spec, DIM, HEADS)
    x = torch.randn(1, side, side, DIM)

    def infer() -> None:
        with torch.no_grad():
            layer(x)

    def train() -> None:
        layer.zero_grad()
        layer(x).sum().backward()

    least = 3 if side < SIDES[-1] else 1
    peak = held_bytes(train)[1]
    infer()
    return {
        "attention": name,
        "tokens": side * side,
        "forward_ms": 1e3 * median(infer, least, seconds),
        "training_ms": 1e3 * median(train, least, seconds),
        "peak_MiB": peak / 2**20,
    }


def crossover(rows: list[dict[str, Any]], name: str, base: str = "softmax") -> float | None:
    """Tokens from which on an attention is faster than another, forward; None if it never is.

    Between two sizes, times are powers of the number of tokens.

    Args:
        rows: As `measure` makes them.
        name: The attention.
        base: The other one.
    """

    def times(attention: str) -> dict[int, float]:
        return {r["tokens"]: r["forward_ms"] for r in rows if r["attention"] == attention}

    ours, theirs = times(name), times(base)
    sizes = sorted(set(ours) & set(theirs))
    if not sizes or ours[sizes[-1]] >= theirs[sizes[-1]]:
        return None
    found = float(sizes[0])
    for low, high in zip(sizes, sizes[1:], strict=False):
        a, b = (math.log(ours[n] / theirs[n]) for n in (low, high))
        if a >= 0 > b:
            share = a / (a - b)
            found = math.exp(math.log(low) * (1 - share) + math.log(high) * share)
    return found


def draw(record: dict[str, Any], path: Path) -> None:
    """Time of a forward pass against the number of tokens, a line for each attention."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 9), layout="constrained")
    axes = figure.subplots()
    names = sorted({row["attention"] for row in record["rows"]})
    for number, name in enumerate(names):
        rows = [row for row in record["rows"] if row["attention"] == name]
        style = ("-", "--", ":", "-.")[number // 10 % 4]
        sizes, times = [r["tokens"] for r in rows], [r["forward_ms"] for r in rows]
        plain = {"color": "black", "linewidth": 2.5} if name == "softmax" else {"linewidth": 1}
        axes.loglog(sizes, times, linestyle=style, label=name, marker=".", **plain)
    axes.set_xlabel("tokens")
    axes.set_ylabel(f"forward pass of a layer, {DIM} channels, {HEADS} heads (ms)")
    axes.set_xticks([side * side for side in SIDES], [str(side * side) for side in SIDES])
    axes.minorticks_off()
    axes.set_title(record["machine"], fontsize="medium")
    figure.legend(loc="outside lower center", ncols=5, fontsize="small")
    write_atomically(
        path, lambda temporary: figure.savefig(temporary, format="svg", metadata={"Date": None})
    )


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=specs(), default=None)
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="of the square maps")
    parser.add_argument("--seconds", type=float, default=0.3, help="per measurement, at least")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--commit", default=None, help="recorded; default: that of the checkout")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    path = args.output / "mixers_cpu.json"
    names = list(specs()) if args.only is None else args.only
    kept: list[dict[str, Any]] = []
    if args.only is not None and path.exists():
        kept = [r for r in json.loads(path.read_text())["rows"] if r["attention"] not in names]
    rows = []
    for name in names:
        for side in args.sides:
            row = measure(name, side, args.seconds)
            if row is None:
                continue
            rows.append(row)
            print(
                f"{name:<20}{row['tokens']:>6} tokens{row['forward_ms']:10.1f} ms forward"
                f"{row['training_ms']:10.1f} ms training{row['peak_MiB']:8.0f} MiB",
                flush=True,
            )
    record = {
        "machine": f"{machine()}, 1 thread used",
        "commit": args.commit or commit(),
        "torch": torch.__version__,
        "dim": DIM,
        "heads": HEADS,
        "rows": sorted([*kept, *rows], key=lambda r: (r["attention"], r["tokens"])),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))
    draw(record, args.output / "mixers_cpu.svg")


if __name__ == "__main__":
    if not KEEP_PAGES.items() <= os.environ.items():  # see accounts/attention-cpu.md
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_PAGES})
    main()
