"""Kills a training run again and again, resumes it, and compares it with one left alone.

    python benchmarks/kill_test.py --output benchmarks/results/kill_test_cpu.json

Both runs train a small model on scikit-learn's digits with everything on that draws random numbers
or keeps state between updates, and save their state every other update, so that many a SIGKILL
hits a write. Every file of the two runs is compared: tensors bit for bit, metrics but for times.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout

from benchmarks.attention import commit, machine  # noqa: E402
from vitlinear.train.progress import TIMES  # noqa: E402
from vitlinear.train.record.saved_state import read_newest, read_state  # noqa: E402

FLAGS = [
    "--dataset", "digits", "--model", "test_ravlt", "--img-size", "16", "--in-chans", "1",
    "--mean", "0.5", "--std", "0.5", "-b", "64", "--lr", "1e-3",
    "--warmup-epochs", "1", "--sched-on-updates", "--clip-grad", "1", "--grad-accum-steps", "2",
    "--drop-path", "0.1", "--mixup", "0.8", "--cutmix", "1", "--reprob", "0.25",
    "--aa", "rand-m9-mstd0.5-inc1", "--model-ema", "--model-ema-decay", "0.99",
    "--amp", "--amp-dtype", "float16", "--recovery-interval", "2", "--no-plot",
    "--log-interval", "3", "--device", "cpu", "-j", "1",
]  # fmt: skip


def start(folder: Path, epochs: int) -> subprocess.Popen[bytes]:
    """Starts or resumes the run, by the same command, in a process group of its own."""
    command = [sys.executable, str(ROOT / "tools" / "train.py"), *FLAGS, "--epochs", str(epochs)]
    command += ["--output", str(folder), "--resume", "auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(folder.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def updates(folder: Path) -> int:
    """Updates in the newest whole state, which a run would go on from; 0 where there is none."""
    state, _ = read_newest(folder)
    return state["updates"] if state else 0


def kill_until_done(folder: Path, epochs: int, kills: int, seed: int) -> list[dict[str, Any]]:
    """Kills the run at random moments, at least ``kills`` times; then lets it end.

    Each time after training has gone on, so that every kill costs and every start gains.
    """
    draw, found = random.Random(seed), []
    while len(found) < kills:
        before, process = updates(folder), start(folder, epochs)
        stamp = folder / "last_state.pt"
        written = stamp.stat().st_mtime_ns if stamp.exists() else 0
        while process.poll() is None:
            if stamp.exists() and stamp.stat().st_mtime_ns != written:
                break
            time.sleep(0.01)
        if len(found) % 2:  # every other kill is to hit a write, which takes some milliseconds
            while process.poll() is None and not any(folder.glob(".*.tmp")):
                time.sleep(0.0005)
            time.sleep(draw.uniform(0.0, 0.01))
        else:
            time.sleep(draw.uniform(0.0, 0.6))
        if process.poll() is not None:
            raise SystemExit(
                f"the run ended (status {process.returncode}) after {len(found)} kills of {kills}: "
                "give it more --epochs"
            )
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        half = sorted(path.name for path in folder.glob(".*.tmp"))
        found.append({"from": before, "to": updates(folder), "half_written": half})
        print(f"kill {len(found)}: {found[-1]}", flush=True)
    if start(folder, epochs).wait() != 0:
        raise SystemExit(f"the last start failed: {folder.with_suffix('.log')}")
    return found


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Names every leaf of nested containers."""
    if isinstance(value, dict):
        return {k: v for key, x in value.items() for k, v in flat(x, f"{name}.{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, x in enumerate(value) for k, v in flat(x, f"{name}.{i}").items()}
    return {name: value}


def differences(first: Path, second: Path) -> tuple[list[str], int]:
    """Returns the names of everything that differs between two runs, and how much was compared."""
    parts: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for name in ("last.safetensors", "best.safetensors"):
        parts.append((load_file(first / name), load_file(second / name)))
    states = []
    for folder in (first, second):
        state = flat(read_state(folder / "last_state.pt"))
        states.append({k: v for k, v in state.items() if k != ".args.output"})
    parts.append((states[0], states[1]))
    rows = []
    for folder in (first, second):
        text = "".join((folder / name).read_text() for name in ("metrics.jsonl", "updates.jsonl"))
        lines = [json.loads(line) for line in text.splitlines()]
        for line in lines:
            for key in TIMES:
                line.pop(key, None)
        rows.append(flat(lines, "metrics"))
    parts.append((rows[0], rows[1]))
    found, count = [], 0
    for one, other in parts:
        found += sorted(one.keys() ^ other.keys())
        for key in one.keys() & other.keys():
            count += 1
            a, b = one[key], other[key]
            same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            found += [] if same else [key]
    return found, count


def main() -> None:
    """Runs both and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=10, help="of 11 updates")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill-test-"))
    began = time.perf_counter()
    if start(folder / "whole", args.epochs).wait() != 0:
        raise SystemExit(f"the run failed: {folder / 'whole.log'}")
    whole = time.perf_counter() - began
    kills = kill_until_done(folder / "killed", args.epochs, args.kills, args.seed)
    found, count = differences(folder / "whole", folder / "killed")
    result = {
        "command": "python benchmarks/kill_test.py " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "commit": commit(),
        "torch": torch.__version__,
        "flags": [*FLAGS, "--epochs", str(args.epochs)],
        "kills": kills,
        "kills_in_a_write": sum(bool(kill["half_written"]) for kill in kills),
        "updates": updates(folder / "whole"),
        "seconds_undisturbed": round(whole, 1),
        "compared": count,
        "differences": found,
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{len(kills)} kills, {result['kills_in_a_write']} of them in a write; {count} tensors and "
        f"numbers compared, {len(found)} differ{': ' + ', '.join(found[:5]) if found else ''}"
    )
    if found:
        raise SystemExit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
