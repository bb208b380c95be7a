"""A table of what every GPU kernel takes of a GPU, from the compiled code alone: no GPU is needed.

For each kind of call of the published models, in each half type, and each kernel that it runs on:
registers and spills, shared memory, programs that share a processor, loads that are in flight while
a block is computed, what a token moves against the least possible, programs against processors.

    python benchmarks/kernel_resources.py    # writes benchmarks/results/kernels_sm80_sm90.json

and the table in benchmarks/accounts/kernels.md. Compiling takes minutes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from vitlinear import ops
from vitlinear.ops.backward import LinearGradients
from vitlinear.ops.rotary import kernel_table_dtype
from vitlinear.ops.terms import Terms
from vitlinear.ops.triton import calls, launch, state_launch, tuning
from vitlinear.ops.triton.plan import make_plan

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "kernels_sm80_sm90.json"
ACCOUNT = ROOT / "accounts" / "kernels.md"
TABLE_BEGINS, TABLE_ENDS = "<!-- table begins -->", "<!-- table ends -->"
WINDOW, SHORT, LONG = (7, 7), (14, 14), (56, 56)  # one kernel, for several maps and for one; splits
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ITEM_SIZE = 2  # bytes of both


class Processor(NamedTuple):
    """Limits of a streaming multiprocessor (CUDA's programming guide, compute capabilities).

    Attributes:
        count: How many the GPU has: A100 and H100 (SXM).
        shared: Bytes of shared memory.
        warps: Warps that it holds.
        registers: Registers.
    """

    count: int
    shared: int
    warps: int = 64
    registers: int = 65536


PROCESSORS = {80: Processor(108, 164 * 1024), 90: Processor(132, 228 * 1024)}


class Kind(NamedTuple):
    """A kind of call.

    Attributes:
        mechanism: Key in `MECHANISMS`.
        head_dim: D.
        terms: Names of the `Terms` that it is given.
        full_width: Whether rotary tables turn all heads side by side.
        value_dim: Dv of the calls of states by themselves, and of reads; 0 for whole calls.
    """

    mechanism: str
    head_dim: int
    terms: tuple[str, ...]
    full_width: bool = False
    value_dim: int = 0

    @property
    def value_tensors(self) -> int:
        """Size of the values, in tensors [B, N, h, D]."""
        return (self.value_dim or self.head_dim) // self.head_dim


class _Absent:
    """A driver for a GPU that is not there; Triton keeps kernels by the device's number."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def only_compiling(capability: int) -> Iterator[list[tuple[Any, Any, dict[str, Any]]]]:
    """Calls compile kernels and start none; yields (function, kernel, options) of each."""
    done: list[tuple[Any, Any, dict[str, Any]]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        most = PROCESSORS[capability].shared - 1024  # of one program
        if kernel.metadata.shared > most:  # as a launch would; the next configuration is tried
            raise OutOfResources(kernel.metadata.shared, most, "shared memory")
        done.append((self.fn, kernel, options))
        return kernel

    count = PROCESSORS[capability].count
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(calls, "processors", lambda device: count),
        mock.patch.object(calls, "_prepared", {}),
        mock.patch.object(tuning, "_chosen", {}),
        mock.patch.object(tuning, "is_fixed", lambda: True),
    ):
        driver.set_active(_Absent(capability))
        try:
            yield done
        finally:
            driver.set_active(None)  # to be found anew


def tables_of(
    kind: Kind, heads: int, grid: tuple[int, int], dtype: torch.dtype
) -> ops.RotaryTables | None:
    """The position tables of a kind of call, as kernels take them."""
    if "rotary" not in kind.terms:
        return None
    of_tables = kernel_table_dtype(dtype)
    if kind.full_width:
        return ops.full_width_rotary_tables(*grid, heads * kind.head_dim, dtype=of_tables)
    cosine = ops.get_mechanism(kind.mechanism).positions == "cosine"
    make = ops.lrpe_tables if cosine else ops.rotary_tables
    return make(*grid, kind.head_dim, dtype=of_tables)


def call(kind: Kind, grid: tuple[int, int], dtype: torch.dtype) -> None:
    """A forward and a backward pass of a kind of call, on zeros."""
    if kind.value_dim:
        _call_of_states(kind, grid, dtype)
        return
    row, length, heads = ops.get_mechanism(kind.mechanism), grid[0] * grid[1], 2
    qkv = torch.zeros(2, length, 5, heads, kind.head_dim, dtype=dtype)
    q, k, v, gate, lepe = qkv.unbind(2)
    scale, has_gate = "head_scale" in kind.terms, "gate" in kind.terms
    terms = Terms(
        rotary=tables_of(kind, heads, grid, dtype),
        head_scale=torch.ones(heads) if scale else None,
        lepe=lepe if "lepe" in kind.terms else None,
        gate=gate if has_gate else None,
        powers=torch.ones(heads, kind.head_dim) if "powers" in kind.terms else None,
    )
    out, state = launch.forward(q, k, v, row, terms)
    grad_q, grad_k, grad_v, grad_gate, grad_lepe = torch.zeros_like(qkv).unbind(2)
    grads = LinearGradients(
        grad_q,
        grad_k,
        grad_v,
        head_scale=torch.ones(heads) if scale else None,
        lepe=grad_lepe if has_gate and terms.lepe is not None else None,
        gate=grad_gate if has_gate else None,
        powers=None if terms.powers is None else torch.zeros_like(terms.powers),
    )
    launch.backward(out, q, k, v, row, terms, state, grads)


def _call_of_states(kind: Kind, grid: tuple[int, int], dtype: torch.dtype) -> None:
    """A read of a state, and a state by itself: ViT³ turns the keys of states beforehand."""
    row, length, heads = ops.get_mechanism(kind.mechanism), grid[0] * grid[1], 2
    q, k = torch.zeros(2, 2, length, heads, kind.head_dim, dtype=dtype)
    v = torch.zeros(2, length, heads, kind.value_dim, dtype=dtype)
    terms = Terms(rotary=tables_of(kind, heads, grid, dtype))
    of_others = ops.LinearAttentionState(torch.zeros(2, heads, kind.head_dim, kind.value_dim))
    out = state_launch.read_forward(q, of_others, row, terms)
    state_launch.read_backward(out, q, of_others, row, terms)
    if terms.rotary is None:
        state = state_launch.state_forward(k, v, row, terms)
        state_launch.state_backward(state, k, v, row, terms, None)


def resources(kernel: Any, capability: int, warps: int) -> dict[str, Any]:
    """Registers and spilled bytes of a thread, shared memory, programs a processor, loads ahead."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (registers,), (stack,) = (re.findall(rf"{x}:(\d+)", usage) for x in ("REG", "STACK"))
    processor = PROCESSORS[capability]
    # A warp takes its registers in units of 256; a program takes 1 KiB of shared memory more.
    of_warp = -(-int(registers) * 32 // 256) * 256
    by_registers = processor.registers // of_warp // warps
    by_shared = processor.shared // (kernel.metadata.shared + 1024)
    waits = [int(n) for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", kernel.asm["ptx"])]
    return {
        "registers": int(registers),
        "spilled_bytes": int(stack),
        "shared_bytes": kernel.metadata.shared,
        "programs_per_processor": min(by_registers, by_shared, processor.warps // warps, 32),
        "loads_in_flight": max(waits, default=0),
    }


def measure(
    kind: Kind,
    capability: int,
    dtype: str,
    grids: Sequence[tuple[int, int]] = (WINDOW, SHORT, LONG),
) -> list[Any]:
    """A row for each kernel that a kind of call runs on, on GPUs of a capability."""
    rows: dict[str, dict[str, Any]] = {}
    with only_compiling(capability) as done:
        for grid in grids:
            call(kind, grid, DTYPES[dtype])
    for function, kernel, options in done:
        name = function.__name__.removesuffix("_kernel")
        if name in ("merge", "sum"):
            continue  # sums of splits, no tokens
        if options.get("with_sums") is False:
            name = "query again"
        if options["plan"].window:
            name += ", windows"
        config = {
            "block_tokens": options["plan"].block_tokens,
            "num_warps": options["num_warps"],
            "num_stages": options["num_stages"],
        }
        rows[name] = {
            "mechanism": kind.mechanism,
            "head_dim": kind.head_dim,
            "terms": list(kind.terms),
            "full_width": kind.full_width,
            "value_dim": kind.value_dim,
            "dtype": dtype,
            "capability": capability,
            "kernel": name,
            **config,
            **resources(kernel, capability, options["num_warps"]),
            "tensors": tensors(name, kind),
        }
    return list(rows.values())


def least(kind: Kind) -> tuple[int, int]:
    """Tensors [B, N, h, D] that a forward and a backward pass move if each goes once."""
    lepe, gate, values = "lepe" in kind.terms, "gate" in kind.terms, kind.value_tensors
    forward = 2 + (2 + lepe + gate) * values
    return forward, 4 + (3 + 2 * gate + 2 * (lepe and gate)) * values


def tensors(kernel: str, kind: Kind) -> int:
    """Tensors [B, N, h, D] that a kernel moves; what it reads again is in the cache by then."""
    one_query = ops.get_mechanism(kind.mechanism).has_global_query
    forward, backward = least(kind)
    keys = 1 + kind.value_tensors  # and values
    return {
        "forward": forward,
        "backward": backward,
        "mean_query": 1,
        "state": keys,
        "read": forward - keys,
        "query": backward - 2 * keys - one_query,
        "key_mean": keys,
        "key": 2 * keys,
        "query again": 3,
    }[kernel.removesuffix(", windows")]


def published() -> dict[Kind, list[tuple[int, int]]]:
    """The kinds of call of the published models, and (tokens, heads) of each of their calls."""
    import timm

    from vitlinear.models import our_models
    from vitlinear.report import attention_calls

    found: dict[Kind, set[tuple[int, int]]] = {}
    for name in our_models(tests=False):
        with torch.device("meta"):
            model = timm.create_model(name)
        for attention in attention_calls(model):
            work = attention.work
            if work is None:
                continue  # softmax
            pairs = zip(Terms._fields, work.given, strict=True)
            terms = tuple(term for term, there in pairs if there)
            kind = Kind(work.mechanism, work.head_dim, terms, work.full_width, work.value_dim)
            found.setdefault(kind, set()).add((work.length, work.heads))
    return {kind: sorted(found[kind]) for kind in sorted(found)}


def terms_of(kind: Kind, heads: int) -> Terms:
    """Terms that a plan is made of: which there are, without numbers."""
    terms = Terms(
        *(torch.empty(0) if term in kind.terms else None for term in Terms._fields)  # type: ignore[arg-type]
    )
    return terms._replace(rotary=tables_of(kind, heads, (1, 1), torch.bfloat16))


def programs(kind: Kind, length: int, heads: int, capability: int) -> dict[str, Any]:
    """Programs of a call on one image: of the passes that leave sums, and of the others."""
    row = ops.get_mechanism(kind.mechanism)
    with only_compiling(capability):
        plan = make_plan(
            row, torch.bfloat16, kind.head_dim, terms_of(kind, heads), kind.value_dim or None
        )
        cuts = calls.cuts(plan, heads, length, ITEM_SIZE, torch.device("cuda"))
    summing, wide = (cut.splits * heads for cut in cuts)
    return {
        "call": label(kind),
        "capability": capability,
        "tokens": length,
        "heads": heads,
        "programs_summing": summing,
        "programs": wide,
        "processors": PROCESSORS[capability].count,
    }


def grids(kind: Kind, shapes: Sequence[tuple[int, int]], capability: int) -> list[dict[str, Any]]:
    """`programs` of each map of the published models, in the model with the fewest heads."""
    fewest = dict(sorted(shapes, reverse=True))
    return [programs(kind, length, fewest[length], capability) for length in sorted(fewest)]


def label(kind: Kind) -> str:
    """The name of a kind of call in the tables."""
    dims = f"{kind.head_dim} x {kind.value_dim}" if kind.value_dim else str(kind.head_dim)
    return ", ".join([kind.mechanism, dims, *["full width"] * kind.full_width, *kind.terms])


def render(record: dict[str, Any]) -> str:
    """The tables of the account."""
    lines = [
        "| mechanism, D, terms | kernel | GPU | block, warps, stages | registers | spilled, bytes "
        "| shared, KiB | programs a processor | loads ahead | tensors |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    types: dict[str, dict[Any, Any]] = {dtype: {} for dtype in DTYPES}
    for row in record["kernels"]:
        of_call = label(Kind(*(row[field] for field in Kind._fields)))
        types[row["dtype"]][of_call, row["kernel"], row["capability"]] = [
            f"{row['block_tokens']}, {row['num_warps']}, {row['num_stages']}",
            row["registers"],
            row["spilled_bytes"],
            round(row["shared_bytes"] / 1024),
            row["programs_per_processor"],
            row["loads_in_flight"],
            row["tensors"],
        ]
    for key in dict.fromkeys([*types["bfloat16"], *types["float16"]]):
        of_call, kernel, capability = key
        of_types = [types[dtype].get(key, ["none"] * 7) for dtype in DTYPES]
        cells = [" / ".join(dict.fromkeys(map(str, both))) for both in zip(*of_types, strict=True)]
        lines.append(f"| {' | '.join([of_call, kernel, f'sm_{capability}', *cells])} |")
    lines += [
        "",
        "| mechanism, D, terms | forward, tensors moved / least | backward, moved / least |",
        "| --- | --- | --- |",
    ]
    for row in record["traffic"]:
        moved = [
            f"{row[f'{way}_moved']} / {row[f'{way}_least']}" for way in ("forward", "backward")
        ]
        lines.append(f"| {row['call']} | {moved[0]} | {moved[1]} |")
    lines += [
        "",
        "| mechanism, D, terms | tokens, heads | programs with sums, sm_80 | other programs "
        "| programs with sums, sm_90 | other programs |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    of_gpus: dict[Any, list[str]] = {}
    for row in record["grids"]:
        cells = of_gpus.setdefault((row["call"], row["tokens"], row["heads"]), [])
        cells += [f"{row[each]} / {row['processors']}" for each in ("programs_summing", "programs")]
    for (of_call, tokens, heads), cells in of_gpus.items():
        lines.append(f"| {of_call} | {tokens}, {heads} | {' | '.join(cells)} |")
    return "\n".join(lines)


def traffic(kind: Kind, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tensors that a call in splits moves, against the least."""
    backward = ("query", "key_mean", "key", "query again")
    moved = {row["kernel"]: row["tensors"] for row in rows}
    least_forward, least_backward = least(kind)
    return {
        "call": label(kind),
        "forward_moved": sum(moved.get(name, 0) for name in ("mean_query", "state", "read")),
        "forward_least": least_forward,
        "backward_moved": sum(moved.get(name, 0) for name in backward),
        "backward_least": least_backward,
    }


def main() -> None:
    """Compile, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--render", action="store_true", help="only write the table anew")
    if not parser.parse_args().render:
        record: dict[str, Any] = {"triton": triton.__version__}
        record |= {"kernels": [], "traffic": [], "grids": []}
        for kind, shapes in published().items():
            for capability in PROCESSORS:
                for dtype in DTYPES:
                    rows = measure(kind, capability, dtype)
                    record["kernels"] += rows
                    for row in rows:
                        print(*row.values(), flush=True)
                record["grids"] += grids(kind, shapes, capability)
            if not kind.value_dim:  # what reads a state moves each tensor once
                record["traffic"] += [traffic(kind, rows)]
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = ACCOUNT.read_text(encoding="utf-8")
    before, _, rest = text.partition(TABLE_BEGINS)
    _, _, after = rest.partition(TABLE_ENDS)
    table = render(json.loads(RESULTS.read_text(encoding="utf-8")))
    ACCOUNT.write_text(f"{before}{TABLE_BEGINS}\n{table}\n{TABLE_ENDS}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
