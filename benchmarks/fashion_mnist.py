"""Every attention of the library in two small skeletons on Fashion-MNIST, all else being equal.

    python benchmarks/fashion_mnist.py --output output/study           # train what is not yet there
    python benchmarks/fashion_mnist.py --speed --output output/study   # on a quiet machine
    python benchmarks/fashion_mnist.py --table --output output/study   # results/, accounts/
    python benchmarks/fashion_mnist.py --mixers --output output/mixers # the registry, see below

A skeleton is a model of the library with sizes that make about a million parameters; attentions
differ in the argument ``attn_types`` or ``attn_type`` alone, so a run is one call of ``vitlinear
train`` with ``benchmarks/fashion_mnist.yaml``. Runs go seed by seed, and each leaves one JSON file;
started again, the script goes on where it was stopped. On another machine it does so with
``--known-runs``, which names results that ``--table`` wrote. A run that fails is recorded with its
error.

``--mixers`` is the same study of every attention of `vitlinear.list_attentions`, in the isotropic
skeleton alone: three seeds of each, one seed of the forms that scan the map. It trains in float32:
a step under bfloat16 autocast takes nine times longer on a processor without instructions for it.

Training time says nothing here when the machine has other work: speed and memory are measured by
``--speed`` alone.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import statistics
import struct
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout

from benchmarks.attention import KEEP_PAGES, commit, held_bytes, machine  # noqa: E402
from benchmarks.mixers import scans, specs  # noqa: E402
from benchmarks.study_table import BASELINES, write_tables  # noqa: E402
from vitlinear import ops  # noqa: E402
from vitlinear.data.sources import FASHION_MNIST_DEBIAN  # noqa: E402
from vitlinear.errors import UserError  # noqa: E402
from vitlinear.train import run as training  # noqa: E402

HERE = Path(__file__).resolve().parent
RECIPE = HERE / "fashion_mnist.yaml"
# Not among them: what a layer of its own needs, and what has no normaliser.
NOT_STUDIED = ("pola", "identity")
FIRST = ("softmax", "elu", "relu")
ATTENTIONS = (*FIRST, *(m for m in ops.MECHANISMS if m not in (*FIRST, *NOT_STUDIED)))
# The registry: rows of the operator first, which run as above, and last what scans the map.
DIRECTIONAL = tuple(scans())
MIXERS = (*ATTENTIONS, *(name for name in specs() if name not in (*ATTENTIONS, *DIRECTIONAL)))
MIXERS += DIRECTIONAL
# Registered model, side of the images, and arguments beside the attention.
SKELETONS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "pyramid": (
        "ravlt_t",
        40,
        {
            "embed_dims": (32, 64, 128, 160),
            "depths": (1, 1, 2, 1),
            "num_heads": (1, 2, 4, 5),
            "mlp_ratios": (3.0, 3.0, 3.0, 3.0),
            "head_width": 256,
        },
    ),
    "isotropic": (
        "linear_deit_tiny",
        28,
        {"patch_size": 4, "embed_dim": 168, "depth": 3, "num_heads": 6, "global_pool": "avg"},
    ),
}
LARGER_SIDE = 112  # of the images of the second speed measurement


def model_kwargs(skeleton: str, attention: str) -> dict[str, Any]:
    """Constructor arguments of a skeleton with one attention everywhere."""
    name, _, kwargs = SKELETONS[skeleton]
    if name == "ravlt_t":
        types: dict[str, Any] = {"attn_types": (specs().get(attention, attention),) * 4}
    elif attention in ATTENTIONS:
        types = {"attn_type": attention}
    else:
        types = {"attention": specs()[attention]}
    return {**kwargs, **types}


def make_model(skeleton: str, attention: str, side: int | None = None) -> torch.nn.Module:
    """A skeleton for images of one channel; side None means that of the runs."""
    name, usual, _ = SKELETONS[skeleton]
    size = {"img_size": side or usual} if skeleton == "isotropic" else {}
    kwargs = model_kwargs(skeleton, attention)
    return timm.create_model(name, in_chans=1, num_classes=10, **size, **kwargs)


def write_subset(source: Path, folder: Path, train: int, test: int | None = None) -> Path:
    """Write the first images of Fashion-MNIST, whose order is random, as IDX files.

    Args:
        source: Folder of the four gzipped IDX files.
        folder: Where to write.
        train: Training images.
        test: Test images; None for all.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("t10k", test)):
        for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
            raw = gzip.decompress((source / f"{split}-{kind}-ubyte.gz").read_bytes())
            total = int.from_bytes(raw[4:8], "big")
            kept = total if count is None else min(count, total)
            item = (len(raw) - header) // total
            data = raw[:4] + struct.pack(">I", kept) + raw[8 : header + kept * item]
            (folder / f"{split}-{kind}-ubyte").write_bytes(data)
    return folder


def flags(
    skeleton: str, attention: str, seed: int, data: Path, output: Path, autocast: bool = True
) -> list[str]:
    """Flags of ``vitlinear train`` for one run."""
    name, side, _ = SKELETONS[skeleton]
    kwargs = model_kwargs(skeleton, attention)
    return [
        *("--config", str(RECIPE), "--data-dir", str(data), "--output", str(output), "--overwrite"),
        *("--seed", str(seed), "--model", name, "--img-size", str(side), "--model-kwargs"),
        *(f"{key}={value!r}".replace(" ", "") for key, value in kwargs.items()),
        *(() if autocast else ("--no-amp",)),
    ]


def train_one(
    skeleton: str, attention: str, seed: int, data: Path, output: Path, autocast: bool = True
) -> dict[str, Any]:
    """Run one training and return its record."""
    command = flags(skeleton, attention, seed, data, output, autocast)
    record: dict[str, Any] = {"skeleton": skeleton, "attention": attention, "seed": seed}
    record["precision"] = "bfloat16 autocast" if autocast else "float32"
    start = time.perf_counter()
    try:
        training.train(training.parse_arguments(command))
        rows = (output / "metrics.jsonl").read_text().splitlines()
        last = json.loads(rows[-1])
        record |= {key: last[key] for key in ("train_loss", "train_top1", "eval_loss", "eval_top1")}
    except UserError as error:
        record["error"] = str(error)
    record["seconds"] = time.perf_counter() - start
    return record


def record_path(records: Path, skeleton: str, images: int, attention: str, seed: int) -> Path:
    """Where the record of a run is."""
    return records / f"{skeleton}-{images}-{attention}-{seed}.json"


def write_record(records: Path, run: dict[str, Any]) -> None:
    """Write the record of a run, whole or not at all."""
    where = (run[key] for key in ("skeleton", "images", "attention", "seed"))
    path = record_path(records, *where)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(run, indent=1) + "\n")
    partial.rename(path)


def train_all(args: argparse.Namespace) -> None:
    """Run what has no record yet."""
    data = write_subset(args.data_dir, args.output / "data", args.images, args.test_images)
    records = args.output / "runs"
    records.mkdir(exist_ok=True)
    if args.known_runs:
        for run in json.loads(args.known_runs.read_text())["runs"]:
            write_record(records, run)
    for seed, attention, skeleton in itertools.product(args.seeds, args.only, args.skeletons):
        if args.mixers and attention in DIRECTIONAL and seed != args.seeds[0]:
            continue
        path = record_path(records, skeleton, args.images, attention, seed)
        if path.exists():
            continue
        record = train_one(
            skeleton, attention, seed, data, args.output / "last_run", not args.mixers
        )
        record |= {"images": args.images, "commit": args.commit, "torch": torch.__version__}
        write_record(records, record)
        print(time.strftime("%H:%M:%S"), path.stem, record.get("eval_top1", "failed"), flush=True)


def speed(skeleton: str, attention: str, side: int, batch: int, seconds: float) -> dict[str, Any]:
    """Images per second of training steps, and the most memory that one holds."""
    torch.manual_seed(0)
    model = make_model(skeleton, attention, side).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    images, labels = torch.randn(batch, 1, side, side), torch.randint(0, 10, (batch,))

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {
        "skeleton": skeleton,
        "attention": attention,
        "side": side,
        "batch": batch,
        "images_per_s": batch / statistics.median(times),
        "peak_MiB": held_bytes(step)[1] / 2**20,
    }


def speed_all(args: argparse.Namespace) -> None:
    """Measure every attention at the side of the runs and at a larger one."""
    torch.set_num_threads(1)
    rows = []
    for skeleton, (_, usual, _) in SKELETONS.items():
        for side, batch in ((usual, 32), (LARGER_SIDE, 8)):
            for attention in args.only:
                row = speed(skeleton, attention, side, batch, args.seconds)
                rows.append(row)
                print(
                    f"{skeleton:<10}{side:>4} {attention:<9}{row['images_per_s']:8.1f} images/s"
                    f"{row['peak_MiB']:9.1f} MiB",
                    flush=True,
                )
    record = {
        "machine": f"{machine()}, 1 thread used",
        "commit": args.commit,
        "torch": torch.__version__,
        "rows": rows,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "speed.json").write_text(json.dumps(record, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Train, measure or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of records")
    parser.add_argument("--speed", action="store_true", help="measure speed and memory instead")
    parser.add_argument("--table", action="store_true", help="write the tables instead")
    parser.add_argument("--mixers", action="store_true", help="study the registry of attentions")
    parser.add_argument("--skeletons", nargs="+", choices=SKELETONS, default=None)
    parser.add_argument("--only", nargs="+", choices=MIXERS, default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--test-images", type=int, default=None, help="default: all")
    parser.add_argument("--data-dir", type=Path, default=FASHION_MNIST_DEBIAN)
    parser.add_argument("--seconds", type=float, default=2.0, help="per speed measurement")
    parser.add_argument("--known-runs", type=Path, help="begin with those of this results file")
    parser.add_argument("--commit", default=None, help="recorded; default: that of the checkout")
    args = parser.parse_args(argv)
    args.commit = args.commit or commit()
    args.skeletons = args.skeletons or (("isotropic",) if args.mixers else tuple(SKELETONS))
    args.only = args.only or (MIXERS if args.mixers else ATTENTIONS)
    if args.table and args.mixers:
        results = HERE / "results" / "fashion_mnist_mixers_cpu.json"
        # Those of one seed are compared on that seed.
        groups = [[m for m in MIXERS if m not in DIRECTIONAL], [*BASELINES, *DIRECTIONAL]]
        write_tables(args.output, groups, results, HERE / "accounts" / "mixers.md")
    elif args.table:
        results = HERE / "results" / "fashion_mnist_cpu.json"
        write_tables(args.output, [ATTENTIONS], results, HERE / "accounts" / "fashion-mnist.md")
    elif args.speed:
        speed_all(args)
    else:
        torch.set_num_threads(1)
        train_all(args)


if __name__ == "__main__":
    if not KEEP_PAGES.items() <= os.environ.items():  # see accounts/attention-cpu.md
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_PAGES})
    main()
