"""Exchanges, memory and time of processes that share an image by its rows, on CPUs.

    python benchmarks/rows.py traffic --output benchmarks/results/rows_traffic.json
    python benchmarks/rows.py memory --size 512 --output benchmarks/results/rows_memory.json
    python benchmarks/rows.py strong --output benchmarks/results/rows_time.json
    python benchmarks/rows.py weak --output benchmarks/results/rows_time.json
    python benchmarks/rows.py large --output benchmarks/results/rows_time.json

``traffic`` counts the bytes that the process in the middle of three sends, in sums over the image,
halos, and gathered keys and values. It tells them apart by how they grow with the image. The counts
depend on no machine. ``memory`` is the peak of the tensors that a training step makes in a process.

The others need an idle machine: ``strong`` times steps of one image on more processes, ``weak``
those of images that grow with them, ``large`` one step at 4096 x 4096 on two processes. Each
process has one thread; they talk over gloo.

Every row is written as soon as it is measured. A file that is there gets the new rows beside its
own, which stay unless they are measured again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import distributed, nn  # noqa: E402
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from benchmarks.attention import commit, held_bytes, machine  # noqa: E402
from benchmarks.rows_traffic import RANKS, SIZES, Traffic, growth, table  # noqa: E402
from benchmarks.subject import status  # noqa: E402
from vitlinear.create import build_model  # noqa: E402
from vitlinear.files import write_text  # noqa: E402
from vitlinear.parallel import parallelize, shard_rows  # noqa: E402

CLASSES = 10
# One of each family, those that have sums and those that have softmax stages.
FAMILIES = (
    "test_ravlt_linear", "test_ravlt", "test_mavit_linear", "test_nalaformer_linear", "test_mila",
    "test_l2vit", "test_vittt", "test_h_vittt", "test_lightnet", "test_linear_deit",
    "test_inline_deit", "test_inline_pvt", "test_inline_swin", "test_inline_cswin",
    "test_pola_pvt", "test_pola_swin",
)  # fmt: skip
PUBLISHED = ("ravlt_t_linear",)
LIMIT = 300  # seconds that processes wait for each other


def on_ranks(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls ``function(mesh, *args)`` in processes that share images; returns what each does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "timm"])
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(count, mp_context=context) as pool,
    ):
        place = f"file://{folder}/meet"
        calls = [pool.submit(_rank, rank, count, place, function, args) for rank in range(count)]
        return [call.result() for call in calls]


def _rank(
    rank: int, count: int, place: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=LIMIT)
    distributed.init_process_group(
        "gloo", init_method=place, rank=rank, world_size=count, timeout=wait
    )
    mesh = init_device_mesh("cpu", (count,), mesh_dim_names=("rows",))
    try:
        return function(mesh["rows"], *args)
    finally:
        distributed.barrier()
        distributed.destroy_process_group()


class Step:
    """A training step of one image on the rows of this process.

    Args:
        mesh: The processes that share it.
        name: Of the model.
        height: Of the image.
        width: Of the image.
        checkpointing: Whether blocks are computed twice.
    """

    def __init__(
        self, mesh: DeviceMesh, name: str, height: int, width: int, checkpointing: bool = False
    ) -> None:
        torch.manual_seed(0)
        model = build_model(name, num_classes=CLASSES)
        if checkpointing:
            model.set_grad_checkpointing()
        self.model: nn.Module = model.train()
        parallelize(self.model, mesh)
        self.image = torch.randn(1, 3, height, width)
        self.shard, self.rows = shard_rows(self.image, mesh)
        self.shard = self.shard.contiguous()
        self.label = torch.tensor([1])

    def spread(self) -> Step:
        """Has gradients averaged over the processes, and an optimiser use them."""
        self.model = DistributedDataParallel(self.model)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        return self

    def passes(self) -> None:
        """Forward and backward."""
        with self.rows:
            F.cross_entropy(self.model(self.shard), self.label).backward()

    def train(self) -> None:
        """Forward, backward and update."""
        self.passes()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


def count_traffic(mesh: DeviceMesh, names: list[str]) -> dict[str, Any]:
    """Counts what this process sends for images of several sizes, by model."""
    found = {}
    for name in names:
        images = []
        for height, width in SIZES:
            step = Step(mesh, name, height, width)
            with Traffic() as traffic, step.rows:
                loss = F.cross_entropy(step.model(step.shard), step.label)
                traffic.way = "backward"
                loss.backward()
            images.append(traffic.messages)
        found[name] = growth(*images)
    return found


def memory_of_step(mesh: DeviceMesh, name: str, size: int, checkpointing: bool) -> dict[str, Any]:
    """MiB of tensors that a training step makes in this process, its gradients left out."""
    step = Step(mesh, name, size, size, checkpointing)
    gradients = sum(x.numel() * x.itemsize for x in step.model.parameters())
    return {"MiB": (held_bytes(step.passes)[1] - gradients) / 2**20}


def time_steps(
    mesh: DeviceMesh, name: str, height: int, width: int, steps: int, checkpointing: bool
) -> dict[str, Any]:
    """Seconds of training steps, begun together, and processor time of this process."""
    step = Step(mesh, name, height, width, checkpointing).spread()
    seconds, cpu = [], []
    for _ in range(steps + 1):  # the first warms up
        distributed.barrier()
        start, own = time.perf_counter(), time.process_time()
        step.train()
        distributed.barrier()
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - own)
    kept = slice(1, None) if steps else slice(None)
    return {
        "seconds": statistics.median(seconds[kept]),
        "cpu_seconds": statistics.median(cpu[kept]),
        "peak_GiB": status("VmHWM") / 1024,
    }


class Record:
    """A JSON file of rows, and of counts by model, of one machine.

    Args:
        path: The file; None keeps nothing.
    """

    KEYS = ("kind", "model", "size", "height", "width", "checkpointing", "ranks")

    def __init__(self, path: Path | None) -> None:
        self.path = path
        here = {"machine": machine(), "torch": torch.__version__}
        self.found: dict[str, Any] = here
        if path is None or not path.exists():
            return
        self.found = json.loads(path.read_text())
        there = {key: self.found.get(key) for key in here}
        if there != here:
            raise SystemExit(f"{path} is of {there}, not of {here}: give another file")

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row; one of the same keys goes."""
        rows = {self._key(one): one for one in self.found.get("rows", [])}
        rows[self._key(row)] = self._signed(row)
        self._write(rows=list(rows.values()))

    def add_models(self, counts: dict[str, dict[str, Any]]) -> None:
        """Adds counts by model."""
        new = {name: self._signed(one) for name, one in counts.items()}
        self._write(models={**self.found.get("models", {}), **new})

    def _key(self, row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in self.KEYS)

    @staticmethod
    def _signed(row: dict[str, Any]) -> dict[str, Any]:
        command = " ".join(["python", "benchmarks/rows.py", *sys.argv[1:]])
        return {**row, "command": command, "commit": commit()}

    def _write(self, **found: Any) -> None:
        self.found |= found
        if self.path:
            write_text(self.path, json.dumps(self.found, indent=1) + "\n")


def traffic(args: argparse.Namespace, record: Record) -> None:
    """Prints and records what is sent."""
    found = on_ranks(RANKS, count_traffic, args.models or [*FAMILIES, *PUBLISHED])[RANKS // 2]
    print(*table(found, "pass"), "", *table(found, "layer"), sep="\n")
    record.add_models(found)


def memory(args: argparse.Namespace, record: Record) -> None:
    """Prints and records the memory of a step for each number of processes."""
    for name in args.models or ["test_ravlt_linear", "ravlt_t_linear"]:
        for checkpointing in (False, True):
            alone = 0.0
            for ranks in (1, *(n for n in args.ranks if n > 1)):
                found = on_ranks(ranks, memory_of_step, name, args.size, checkpointing)
                most = max(one["MiB"] for one in found)
                alone = alone or most
                row = {"model": name, "size": args.size, "checkpointing": checkpointing}
                row |= {"ranks": ranks, "MiB": most, "of_1/ranks": most * ranks / alone}
                record.add(row)
                print(
                    f"{name}, {args.size} x {args.size}, {'' if checkpointing else 'no '}"
                    f"checkpointing, {ranks} processes: at most {most:.1f} MiB, "
                    f"{row['of_1/ranks']:.3f} of one process's over {ranks}",
                    flush=True,
                )


def timing(args: argparse.Namespace, record: Record) -> None:
    """Prints and records the time of steps of one of the three kinds."""
    name = (args.models or ["ravlt_t_linear"])[0]
    size, ranks = args.size, args.ranks
    if args.what == "large":
        # Processes take what the C library keeps for later as well; two of them have no room for
        # it. It reads these when a process starts, and none has been started yet.
        for key in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"):
            os.environ.pop(key, None)
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    plan = {
        "strong": [(n, 768, 512, 2, False) for n in ranks],
        "weak": [(n, 384 * n, 512, 2, False) for n in ranks],
        "large": [(2, size, size, 0, True)],
    }[args.what]
    for count, height, width, steps, checkpointing in plan:
        found = on_ranks(count, time_steps, name, height, width, steps, checkpointing)
        row = {"kind": args.what, "model": name, "ranks": count, "height": height, "width": width}
        row |= {"checkpointing": checkpointing, "steps": steps}
        row |= {key: max(one[key] for one in found) for key in found[0]}
        record.add(row)
        print(
            f"{args.what}: {name}, {height} x {width} on {count}: {row['seconds']:.2f} s, "
            f"{row['cpu_seconds']:.2f} s of processor time in each, {row['peak_GiB']:.2f} GiB",
            flush=True,
        )


MEASURES = {
    "traffic": traffic,
    "memory": memory,
    "strong": timing,
    "weak": timing,
    "large": timing,
}


def main() -> None:
    """Measures one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=list(MEASURES))
    parser.add_argument("--models", nargs="+", metavar="NAME")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--size", type=int, help="side of the image: memory 512, large 4096")
    parser.add_argument("--output", type=Path, help="JSON file, which gets the new rows")
    args = parser.parse_args()
    args.size = args.size or {"memory": 512, "large": 4096}.get(args.what)
    record = Record(args.output)
    MEASURES[args.what](args, record)


if __name__ == "__main__":
    main()
