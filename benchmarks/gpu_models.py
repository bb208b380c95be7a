"""Whole models on a GPU, side by side: ours, as their definitions read, and timm's.

    python benchmarks/gpu_models.py --output FILE.json [--seconds 300]
    TRITON_INTERPRET=1 python benchmarks/gpu_models.py --dry-run --output FILE.json

What `benchmarks/models.py` measures, in the order of how much is asked of it, until time is up: a
row that there was none left for says so. ``@triton`` is a model on the fused kernels, without it on
what the backend ``auto`` takes. Several models prepare at once, since compiling takes most of the
time and one core each. The second line needs no GPU and tries the script.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout

from benchmarks.gpu import machine  # noqa: E402
from benchmarks.models_report import best_modes, print_report  # noqa: E402
from benchmarks.subject import Case, serve  # noqa: E402
from benchmarks.transcription import SUFFIX  # noqa: E402
from vitlinear.benchmark.turns import measure  # noqa: E402
from vitlinear.files import write_text  # noqa: E402

AT_ONCE = 4
TURN = 0.2  # seconds
TIMEOUT = 300  # seconds that a model may take to compile


class Plan(NamedTuple):
    """Models, shapes and modes to measure.

    Attributes:
        models: Names that `benchmarks.subject.build` takes. A transcription, which needs most
            memory, stands beside models that need less: what is prepared at once has to fit.
        shapes: Side and batch size.
        modes: Of `benchmarks.subject.MODES`. Transcriptions run the first alone: the bars are
            set against it.
        precisions: Of inference and of a training step.
        rounds: Turns of each model.
        device: Type of the device.
    """

    models: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    modes: tuple[str, ...]
    precisions: dict[str, str]
    rounds: int
    device: str

    def groups(self) -> Iterator[list[Case]]:
        """Rows that take turns, first those that a bar is set for."""
        tasks = self.precisions.items()
        for mode, (side, batch), (task, precision) in itertools.product(
            self.modes, self.shapes, tasks
        ):
            yield [
                Case(name, mode, task, side, side, batch, self.device, precision, True)
                for name in self.models
                if mode == self.modes[0] or not name.endswith(SUFFIX)
            ]

    def references(self) -> tuple[str, ...]:
        """Whom the others are compared with."""
        return tuple(name for name in self.models if SUFFIX in name or "_patch" in name)


GPU = Plan(
    models=(
        "ravlt_s",
        "ravlt_s@transcription",
        "ravlt_s@triton",
        "deit_small_patch16_224",
        "mavit_s",
        "mavit_s@transcription",
        "mavit_s@triton",
        "swin_tiny_patch4_window7_224",
    ),
    shapes=((224, 128), (1024, 4)),
    modes=("eager", "compiled-as-is", "compiled"),
    precisions={"forward": "bfloat16", "train": "amp_bfloat16"},
    rounds=3,
    device="cuda",
)
DRY = Plan(
    models=("test_ravlt", "test_ravlt@transcription", "test_ravlt@triton", "test_vit"),
    shapes=((32, 2),),
    modes=("eager",),
    precisions={"forward": "float32", "train": "float32"},
    rounds=1,
    device="cpu",
)


def main() -> None:
    """Measures what there is time for, prints tables, writes a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file for everything")
    parser.add_argument("--seconds", type=float, default=300, help="start no row after these")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU")
    args = parser.parse_args()
    start, plan = time.monotonic(), DRY if args.dry_run else GPU
    # The same head as that of `tools/benchmark_models.py`, whose --report reads the file.
    about = machine(torch.device(plan.device))
    record: dict[str, Any] = {
        "dry_run": args.dry_run,
        "command": shlex.join(["python", *sys.argv]),
        "machine": f"{about['device']}; CUDA {about['cuda']}, triton {about.get('triton')}",
        "commit": about["commit"],
        "torch": torch.__version__,
        "timm": about["timm"],
        "vitlinear": about["vitlinear"],
        "reference": plan.references()[0],
        "rows": [],
    }
    deadline = start + args.seconds
    for cases in plan.groups():
        options = {"at_once": AT_ONCE, "deadline": deadline}
        record["rows"] += measure(serve, cases, plan.rounds, TURN, TIMEOUT, **options)
        record["seconds"] = time.monotonic() - start
        write_text(args.output, json.dumps(record, indent=1) + "\n")
    print_report(record)
    for name in plan.references()[1:]:
        print("", *(f"- {line}" for line in best_modes(record["rows"], name)), sep="\n")
    print(f"\n{record['seconds']:.0f} s. Written to {args.output}")


if __name__ == "__main__":
    main()
