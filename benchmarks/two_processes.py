"""Loss curves of one process and of two over gloo with half the batch each, update by update.

    python benchmarks/two_processes.py --output benchmarks/results/two_processes_cpu.json

The model has no batch normalisation and nothing is mixed: both runs then add up the same numbers,
in another order.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout

from benchmarks.attention import commit, machine  # noqa: E402
from vitlinear.checkpoints.load import read_weights  # noqa: E402

RECIPE = ["--dataset", "digits", "--model", "test_linear_deit", "--img-size", 32, "--lr", 1e-3]
RECIPE += ["--warmup-epochs", 1, "--aa", "rand-m9-mstd0.5-inc1", "-j", 0, "--device", "cpu"]
RECIPE += ["--log-interval", 1, "--no-plot"]


def curve(processes: int, batch: int, epochs: int, folder: Path) -> list[float]:
    """Trains, and returns the mean loss of the epoch so far after each update."""
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [sys.executable, "-m", *(launch if processes > 1 else []), "vitlinear", "train"]
    flags = [*RECIPE, "-b", batch // processes, "--epochs", epochs, "--output", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *map(str, flags)], cwd=ROOT, env=environment, check=True)
    rows = (folder / "updates.jsonl").read_text().splitlines()
    return [json.loads(row)["train_loss"] for row in rows]


def main() -> None:
    """Trains both ways, prints the largest differences and writes a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="over all processes")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder) / name for name in ("one", "two")]
        one, two = (
            curve(count + 1, args.batch_size, args.epochs, run) for count, run in enumerate(runs)
        )
        weights = [read_weights(run / "last.safetensors") for run in runs]
    result = {
        "command": f"python benchmarks/two_processes.py --epochs {args.epochs} "
        f"--batch-size {args.batch_size}",
        "machine": machine(),
        "commit": commit(),
        "torch": torch.__version__,
        "updates": len(one),
        "first_loss": one[0],
        "last_loss": one[-1],
        "loss_rel": max(abs(a - b) / a for a, b in zip(one, two, strict=True)),
        "weights_abs": max(
            float((value - weights[1][name]).abs().max()) for name, value in weights[0].items()
        ),
        "curves": {"one": one, "two": two},
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{len(one)} updates, loss {one[0]:.4f} to {one[-1]:.4f}: the curves differ by "
        f"{result['loss_rel']:.1e} of their value at most, the last weights by "
        f"{result['weights_abs']:.1e}"
    )


if __name__ == "__main__":
    main()
