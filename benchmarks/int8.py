"""The price of int8 in accuracy: small models of every family, exported twice and compared.

    python benchmarks/int8.py --output output/int8 --train    # what is not yet there
    python benchmarks/int8.py --output output/int8            # results/, accounts/

A run is one call of ``vitlinear train`` with the committed recipe of the data set, shortened; its
last weights become an ONNX file in float32 and one in int8, calibrated on training images as
``vitlinear export --dtype int8`` does. Both classify the held-out images in onnxruntime. Started
again, ``--train`` goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout

from benchmarks.attention import commit, machine  # noqa: E402
from benchmarks.fashion_mnist import write_subset  # noqa: E402
from benchmarks.study_table import write_between  # noqa: E402
from vitlinear.checkpoints.load import load_model  # noqa: E402
from vitlinear.data.dataset import open_dataset  # noqa: E402
from vitlinear.data.loader import eval_loader  # noqa: E402
from vitlinear.data.sources import FASHION_MNIST_DEBIAN  # noqa: E402
from vitlinear.export import Shapes, calibration, export  # noqa: E402
from vitlinear.export.command import metadata_of  # noqa: E402
from vitlinear.export.shapes import Range  # noqa: E402
from vitlinear.train import run as training  # noqa: E402

HERE = Path(__file__).resolve().parent
RECIPES = HERE.parent / "configs" / "classification"
FINE = {"patch_size": 4}  # 16 would leave 4 tokens of a small image
MODELS: dict[str, dict[str, Any]] = {
    "test_ravlt": {},
    "test_mavit": {},
    "test_nalaformer": {},
    "test_inline_deit": FINE,
    "test_inline_pvt": {},
    "test_inline_swin": {},
    "test_inline_cswin": {},
    "test_l2vit": {},
    "test_lightnet": {},
    "test_linear_deit": FINE,
    "test_mila": {},
    "test_pola_pvt": {},
    "test_pola_swin": {},
    "test_vittt": FINE,
    "test_h_vittt": {},
}


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set and how long is trained on it.

    Attributes:
        recipe: File in configs/classification.
        epochs: Passes over the training images.
        images: Training images, the first; None for all.
    """

    recipe: str
    epochs: int
    images: int | None = None


DATA = {
    "digits": Data("digits_test_ravlt.yaml", 20),
    "fashion_mnist": Data("fashion_mnist_ravlt.yaml", 4, 10_000),
}


def train_one(name: str, data: str, folder: Path, fashion_mnist: Path, seed: int = 0) -> None:
    """Run one training; its last weights are ``folder/last.safetensors``."""
    row, kwargs = DATA[data], MODELS[name]
    where = ("--data-dir", str(fashion_mnist)) if data == "fashion_mnist" else ()
    flags = [
        *("--config", str(RECIPES / row.recipe), "--model", name, "--output", str(folder)),
        *("--epochs", str(row.epochs), "--warmup-epochs", "1", "--workers", "0", "--no-plot"),
        *("--overwrite", "--seed", str(seed), *where),
    ]
    if kwargs:
        flags += ["--model-kwargs", *(f"{key}={value}" for key, value in kwargs.items())]
    training.train(training.parse_arguments(flags))


def train_all(args: argparse.Namespace) -> None:
    """Train what has no weights yet."""
    images = DATA["fashion_mnist"].images
    subset = write_subset(FASHION_MNIST_DEBIAN, args.output / "fashion_mnist", images)
    for name, data in itertools.product(args.models, args.data):
        folder = args.output / f"{name}-{data}"
        if (folder / "trained").exists():
            continue
        start = time.perf_counter()
        train_one(name, data, folder, subset)
        (folder / "trained").touch()  # a run that was killed leaves weights too
        seconds = time.perf_counter() - start
        print(time.strftime("%H:%M:%S"), f"trained {name} on {data} in {seconds:.0f} s", flush=True)


def classify(path: Path, loader: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, classes] of a program for all images, and their labels [N]."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    rows = [(session.run(None, {"images": x.numpy()})[0], y.numpy()) for x, y in loader]
    logits, labels = zip(*rows, strict=True)
    return np.concatenate(logits), np.concatenate(labels)


def difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Mean of second - first in percent, and half its 95 % interval, paired by image.

    Args:
        first: Whether each image is classified correctly, [N].
        second: Likewise, of the same images.
    """
    change = 100 * (second.astype(float) - first.astype(float))
    return float(change.mean()), float(1.96 * change.std(ddof=1) / math.sqrt(len(change)))


def measure(name: str, data: str, output: Path) -> dict[str, Any]:
    """Export one trained model twice, and classify the held-out images with both."""
    folder = output / f"{name}-{data}"
    where = str(output / "fashion_mnist") if data == "fashion_mnist" else None
    channels, height, width = load_model(folder / "last.safetensors")[1].data_config.input_size
    shapes = Shapes.of(name, channels, None, Range(height, height), Range(width, width))
    record: dict[str, Any] = {"model": name, "data": data, "epochs": DATA[data].epochs}
    logits: dict[str, np.ndarray] = {}
    for dtype in (torch.float32, torch.int8):
        model, card = load_model(folder / "last.safetensors")
        model.fuse()  # type: ignore[operator]
        images = calibration.read(card, shapes, data, where) if dtype == torch.int8 else None
        kind = str(dtype).removeprefix("torch.")
        path = folder / f"{kind}.onnx"
        export(model, path, "onnx", shapes, card, metadata_of(card), dtype, images)
        loader = eval_loader(
            open_dataset(data, train=False, mode=card.image_mode, data_dir=where),
            batch_size=250,
            data_config=dataclasses.replace(card.data_config, input_size=(channels, height, width)),
            workers=0,
            device=torch.device("cpu"),
        )
        logits[kind], labels = classify(path, loader)
        record[f"{kind}_top1"] = 100 * float((logits[kind].argmax(1) == labels).mean())
        record[f"{kind}_bytes"] = path.stat().st_size
    full, small = logits["float32"], logits["int8"]
    right = [each.argmax(1) == labels for each in (full, small)]
    minus, interval = difference(*right)
    return record | {
        "images": len(labels),
        "int8_minus_float32": minus,
        "interval_95": interval,
        "same_class": 100 * float((full.argmax(1) == small.argmax(1)).mean()),
        "logits_difference": float(np.linalg.norm(small - full) / np.linalg.norm(full)),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one row for each model and data set."""
    lines = [
        "| model | data | held-out images | float32, top-1 % | int8, top-1 % | int8 minus float32, "
        "points | same class, % | logits differ by, % | size, float32 to int8, kB |",
        "|" + " --- |" * 9,
    ]
    for row in rows:
        sizes = f"{row['float32_bytes'] / 1e3:.0f} to {row['int8_bytes'] / 1e3:.0f}"
        lines.append(
            f"| `{row['model']}` | {row['data']} | {row['images']} | {row['float32_top1']:.2f} "
            f"| {row['int8_top1']:.2f} | {row['int8_minus_float32']:+.2f} ± "
            f"{row['interval_95']:.2f} | {row['same_class']:.2f} "
            f"| {100 * row['logits_difference']:.1f} | {sizes} |"
        )
    return "\n".join(lines)


def measure_all(args: argparse.Namespace) -> None:
    """Measure what was trained and has no record yet; write the results and the table."""
    rows = []
    for data, name in itertools.product(args.data, args.models):
        folder = args.output / f"{name}-{data}"
        if not (folder / "trained").exists():
            continue
        file = folder / "int8.json"
        if not file.exists():
            file.write_text(json.dumps(measure(name, data, args.output), indent=1) + "\n")
            print(time.strftime("%H:%M:%S"), table([json.loads(file.read_text())]).splitlines()[-1])
        rows.append(json.loads(file.read_text()))
    record = {
        "command": f"python benchmarks/int8.py --output output/int8 --data {' '.join(args.data)}",
        "machine": machine(),
        "commit": args.commit or commit(),
        "trained_at": args.trained_at or commit(),
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
        "rows": rows,
    }
    (HERE / "results" / "int8_cpu.json").write_text(json.dumps(record, indent=1) + "\n")
    write_between(HERE / "accounts" / "int8.md", "int8", table(rows))


def main(argv: list[str] | None = None) -> None:
    """Train, or measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of runs")
    parser.add_argument("--train", action="store_true", help="train what is not there yet")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=tuple(MODELS))
    parser.add_argument("--data", nargs="+", choices=DATA, default=tuple(DATA))
    parser.add_argument("--commit", default=None, help="recorded; default: that of the checkout")
    parser.add_argument("--trained-at", default=None, help="likewise, of the training")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.train:
        train_all(args)
    else:
        measure_all(args)


if __name__ == "__main__":
    main()
