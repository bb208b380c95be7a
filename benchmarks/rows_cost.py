"""Calculates training steps of images that 8 to 512 GPUs share by their rows. Nothing is measured.

    python benchmarks/rows_cost.py

The bytes and numbers of exchanges are counted (results/rows_traffic.json), like multiply-adds and
parameters (vitlinear/facts/counts.json). The memory of a pixel is measured (results/
rows_memory.json). Link speeds and peaks are those that makers publish. Utilisation and latencies
are assumptions: arguments change them. For one image of side x side pixels on R GPUs:

    compute  = 2 * MACs per pixel * 4 * pixels / R / (utilisation * peak)
               4: forward, forward again (checkpointing), and twice that backward
    sum      = latency(R) + 2 (R - 1) / R * bytes / link(R)      for each all-reduce
    state    = latency(R) + (R - 1) * bytes / link(R)            for each all-gather
    halo     = latency of one link + bytes * columns / link(R)   for each exchange with neighbours
    map      = latency(R) + (R - 1) / R * bytes * pixels / link(R)  keys and values, of softmax only
    gradient = 2 (R - 1) / R * 4 bytes * parameters / link(R)    not hidden behind backward

    link(R) and latency(R) are NVLink's up to 8 GPUs, the network's beyond: latency of a node, and
    that of the network once for each doubling of the nodes.
    share of exchanges = all but compute / all
    memory   = bytes of a pixel * pixels / R + 16 bytes * parameters (weights, gradients, AdamW)

Exchanges are float32 and add to compute: nothing is overlapped. So the shares are upper bounds, as
far as the assumptions hold.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout

from vitlinear.facts import counts  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
NODE = 8  # GPUs


@dataclass(frozen=True)
class Machine:
    """A GPU and its links; the first four as NVIDIA publishes them for DGX H100.

    Attributes:
        peak: Operations per second, bfloat16 without sparsity.
        memory: Bytes of a GPU.
        nvlink: Bytes per second and direction of a GPU, 900 GB/s in both.
        network: Likewise, a port of 400 Gb/s for each GPU.
        utilisation: Share of the peak; an assumption.
        latency_node: Seconds of an exchange in a node; an assumption.
        latency_network: Seconds that the network adds; an assumption.
    """

    peak: float = 989e12
    memory: float = 80e9
    nvlink: float = 450e9
    network: float = 50e9
    utilisation: float = 0.3
    latency_node: float = 15e-6
    latency_network: float = 10e-6

    def link(self, ranks: int) -> float:
        """Bytes per second between the GPUs of a group."""
        return self.nvlink if ranks <= NODE else self.network

    def latency(self, ranks: int) -> float:
        """Seconds of an exchange of all, without bytes."""
        doublings = math.ceil(math.log2(ranks / NODE)) if ranks > NODE else 0
        return self.latency_node + doublings * self.latency_network

    def latency_of_neighbours(self, ranks: int) -> float:
        """Seconds of an exchange of neighbours, without bytes."""
        return self.latency_node + (self.latency_network if ranks > NODE else 0.0)


@dataclass(frozen=True)
class Costs:
    """The counts of a step of a model, of which nothing depends on the machine.

    Attributes:
        macs: Multiply-adds of a forward pass for a pixel.
        params: Parameters.
        held: Bytes of a training step for a pixel, with checkpointing; NaN if not measured.
        kinds: Calls and bytes of both passes, by kind of exchange.
    """

    macs: float
    params: int
    held: float
    kinds: dict[str, dict[str, float]]


def read_costs(name: str) -> Costs:
    """The counted and measured costs of a model."""
    counted = counts()[name]
    _, height, width = counted["input_size"]
    passes = json.loads((RESULTS / "rows_traffic.json").read_text())["models"][name]["passes"]
    kinds = {
        kind: {key: sum(one[kind][key] for one in passes.values()) for key in ("calls", "bytes")}
        for kind in passes["forward"]
    }
    measured = RESULTS / "rows_memory.json"
    rows = json.loads(measured.read_text())["rows"] if measured.exists() else []
    held = next(
        (
            row["MiB"] * 2**20 / row["size"] ** 2
            for row in rows
            if row["model"] == name and row["checkpointing"] and row["ranks"] == 1
        ),
        math.nan,
    )
    return Costs(counted["total"] / (height * width), counted["params"], held, kinds)


def seconds_of(costs: Costs, machine: Machine, side: int, ranks: int) -> dict[str, float]:
    """Seconds of a step by what they are spent on; see the head of this file."""
    pixels, link, latency = side * side, machine.link(ranks), machine.latency(ranks)
    kinds, ring = costs.kinds, 2 * (ranks - 1) / ranks

    def exchanges(kind: str, wait: float, bytes_factor: float) -> float:
        return kinds[kind]["calls"] * wait + bytes_factor * kinds[kind]["bytes"] / link

    near = machine.latency_of_neighbours(ranks)
    operations = 2 * costs.macs * 4 * pixels / ranks
    return {
        "compute": operations / (machine.utilisation * machine.peak),
        "sum": exchanges("sum", latency, ring),
        "state": exchanges("state", latency, ranks - 1),
        "halo": exchanges("halo", near, side),
        "map": exchanges("map", latency, (ranks - 1) / ranks * pixels),
        "gradient": ring * 4 * costs.params / link,
    }


def table(name: str, machine: Machine, sides: list[int], counts_of_gpus: list[int]) -> list[str]:
    """A Markdown table of the steps of a model."""
    costs = read_costs(name)
    head = "| image | GPUs | compute, ms | sums | states | halos | maps | gradients | step, ms "
    lines = [head + "| share of exchanges | GB of a GPU |", "| --- " * 11 + "|"]
    for side in sides:
        for ranks in counts_of_gpus:
            if side // 32 < ranks:
                continue
            parts = seconds_of(costs, machine, side, ranks)
            step = sum(parts.values())
            held = costs.held * side * side / ranks + 16 * costs.params
            memory = "" if math.isnan(held) else f"{held / 1e9:.3g}"
            memory += " (too much)" if held >= machine.memory else ""
            cells = " | ".join(f"{1e3 * value:.3g}" for value in (*parts.values(), step))
            share = 1 - parts["compute"] / step
            lines.append(f"| {side}² | {ranks} | {cells} | {share:.0%} | {memory} |")
    return lines


def main() -> None:
    """Prints inputs, and a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["ravlt_t_linear"], metavar="NAME")
    parser.add_argument("--sides", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    for name, default in vars(Machine()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=default)
    args: Any = parser.parse_args()
    machine = Machine(**{name: getattr(args, name) for name in vars(Machine())})
    print(f"calculated, not measured: {machine}")
    for name in args.models:
        print(f"\n{name}: {read_costs(name)}\n")
        print(*table(name, machine, args.sides, args.gpus), sep="\n")


if __name__ == "__main__":
    main()
