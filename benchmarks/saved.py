"""Lists the memory that a model keeps for backward, by block and by module.

    python benchmarks/saved.py ravlt_s ravlt_s@transcription --batch-size 2 --size 224

Every tensor that autograd saves is caught by `torch.autograd.graph.saved_tensors_hooks` and put
down to the innermost module running at that time. Memory that several of them share counts once,
for the first; parameters, buffers and the images are there anyway and do not count. Blocks that
keep the same stand in one line.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout

from benchmarks.subject import build  # noqa: E402
from vitlinear.benchmark.programs import parse_sides  # noqa: E402

BLOCK = re.compile(r"(.*?\bblocks\.\d+)(?:\.(.*))?$")


def storage(x: Tensor) -> int:
    """Where the memory of a tensor begins."""
    return x.untyped_storage().data_ptr()


def saved_bytes(model: nn.Module, images: Tensor) -> Counter[str]:
    """Bytes kept for backward by a forward pass, by the name of the module that saved them."""
    running: list[str] = []
    seen = {storage(x) for x in (*model.parameters(), *model.buffers(), images)}
    found: Counter[str] = Counter()

    def named(forward: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            running.append(name)
            try:
                return forward(*args, **kwargs)
            finally:
                running.pop()

        return run

    def pack(x: Tensor) -> Tensor:
        if storage(x) not in seen:
            seen.add(storage(x))
            found[running[-1] if running else ""] += x.untyped_storage().nbytes()
        return x  # kept by the graph: no other tensor comes to stand in the same place

    for name, module in model.named_modules():  # not by hooks, which forbid to compute again
        module.forward = named(module.forward, name)  # type: ignore[method-assign]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            result = model(images)
    finally:
        for module in model.modules():
            del module.forward
    del result
    return found


def by_block(found: Counter[str]) -> dict[str, Counter[str]]:
    """Bytes of each block by module inside of it; of what is in no block by the first name."""
    blocks: dict[str, Counter[str]] = {}
    for name, size in found.items():
        match = BLOCK.match(name)
        block, inside = (match[1], match[2] or "") if match else (name.partition(".")[0], "")
        blocks.setdefault(block, Counter())[inside] += size
    return blocks


def table(found: Counter[str]) -> list[str]:
    """A Markdown table in MiB; neighbours of one list of blocks that keep the same are one line."""
    groups: list[tuple[list[str], Counter[str]]] = []
    for block, parts in by_block(found).items():
        if groups and groups[-1][1] == parts and "." in block:
            groups[-1][0].append(block)
        else:
            groups.append(([block], parts))
    lines = ["| block | MiB | saved by |", "| --- | --- | --- |"]
    for blocks, parts in groups:
        title = blocks[0] if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]}, each"
        cells = [f"{name or 'itself'} {size / 2**20:.2f}" for name, size in parts.most_common()]
        lines.append(f"| {title} | {sum(parts.values()) / 2**20:.2f} | {', '.join(cells)} |")
    lines.append(f"| all | {sum(found.values()) / 2**20:.2f} | |")
    return lines


def main() -> None:
    """Prints a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("-b", "--batch-size", type=int, default=2)
    parser.add_argument("--size", default="224", metavar="SIZE", help="224 or 480x640")
    parser.add_argument("--amp", action="store_true", help="under bfloat16 autocast")
    args = parser.parse_args()
    size = (3, *parse_sides(args.size))
    for name in args.models:
        model, images = build(name, size).train(), torch.randn(args.batch_size, *size)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
            found = saved_bytes(model, images)
        print(f"{name}, batch {args.batch_size}", *table(found), "", sep="\n")


if __name__ == "__main__":
    main()
