"""Images per second of the training input, where its time goes, and how long training waits for it.

    pip install scikit-image
    python benchmarks/loader.py [--workers 0 1 2 4] [--seconds 8] [--output NAME.json]

Makes JPEGs like ImageNet's (sizes, bytes, 4:2:0) out of crops of scikit-image's photographs, as a
folder data set, and reads them with what `vitlinear train` builds from a published recipe: its
transforms, collating with mixup and cutmix, normalising and erasing, at 224. Three measurements:

- cost: each step by itself, one process, one thread;
- loading: images/s of the loader alone by number of data workers, from the time on when the batches
  that workers prepare ahead have been used up;
- training: a small model on this CPU, and the share of time in which it has no batch.

The files are in the page cache: what a disk or a network share adds is not in here.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import skimage
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout

import vitlinear  # noqa: E402
from benchmarks.attention import commit, machine  # noqa: E402
from vitlinear.data import images  # noqa: E402
from vitlinear.data.loader import start_epoch  # noqa: E402
from vitlinear.train import run, setup  # noqa: E402
from vitlinear.train.loop import train_one_epoch  # noqa: E402

PHOTOS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
PHOTOS += ("motorcycle_left.png", "motorcycle_right.png")
SIZES = ((500, 375), (500, 375), (500, 333), (375, 500), (400, 350), (300, 225), (640, 480))
QUALITY, GRAIN = 95, 7.0  # about 100 kB; grain, since resizing smooths the camera's own away
LINKS = 8  # names of each file: an epoch longer than the set is large
RECIPE = ROOT / "configs" / "classification" / "ravlt_t.yaml"


def write_images(root: Path, count: int) -> dict[str, Any]:
    """Writes the data set; returns what it is like."""
    folder = Path(skimage.__file__).parent / "data"
    photos = [Image.open(folder / name).convert("RGB") for name in PHOTOS]
    random = np.random.default_rng(0)
    lengths, sizes = [], []
    for split, number in (("train", count), ("val", 8)):
        for index in range(number):
            label = root / split / f"class{index % 8}"
            label.mkdir(parents=True, exist_ok=True)
            width, height = SIZES[random.integers(len(SIZES))]
            photo = photos[index % len(photos)]
            scale = random.uniform(0.5, 1) * min(photo.width / width, photo.height / height)
            left = random.uniform(0, photo.width - scale * width)
            top = random.uniform(0, photo.height - scale * height)
            box = (left, top, left + scale * width, top + scale * height)
            pixels = np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC, box))
            grained = pixels + random.normal(0, GRAIN, (height, width, 1))
            file = io.BytesIO()
            Image.fromarray(grained.clip(0, 255).astype(np.uint8)).save(
                file, "JPEG", quality=QUALITY, subsampling="4:2:0"
            )
            first = label / f"{index}.jpg"
            first.write_bytes(file.getvalue())
            for link in range(1, LINKS if split == "train" else 1):
                os.link(first, label / f"{index}_{link}.jpg")
            lengths.append(len(file.getvalue()))
            sizes.append((width, height))
    width, height = np.mean(sizes, axis=0)
    return {
        "files": count,
        "mean_kB": float(np.mean(lengths)) / 1000,
        "mean_width": float(width),
        "mean_height": float(height),
        "quality": QUALITY,
    }


def make_run(root: Path, args: argparse.Namespace, workers: int) -> setup.Run:
    """A run as ``vitlinear train`` would set it up."""
    flags = ["--config", RECIPE, "--data-dir", root, "--model", args.model, "-j", workers]
    flags += ["-b", args.batch, "--device", "cpu", "--no-amp", "--no-model-ema", "--lr", 1e-4]
    return setup.set_up(run.parse_arguments([str(flag) for flag in flags]))


def costs(made: setup.Run, count: int) -> dict[str, float]:
    """Milliseconds per image of each step, in this process."""
    loader = made.train_loader
    dataset = loader.loader.dataset.dataset  # below what seeds each image
    start_epoch(loader, 0, 0)
    order = [place.image for batch in loader.batch_sampler for place in batch]
    order = list(itertools.islice(itertools.cycle(order), count))
    spent: dict[str, float] = {}

    def timed(name: str, values: list[Any], step: Any) -> list[Any]:
        start = time.perf_counter()
        results = [step(value) for value in values]
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
        return results

    batch_size = made.config.schedule.batch_size
    chunks = [order[start : start + batch_size] for start in range(0, count, batch_size)]
    for chunk in filter(lambda chunk: len(chunk) == batch_size, chunks):
        read = timed("read", chunk, dataset.source.read)
        decoded = timed("decode", [content for content, _ in read], images.decode)
        rgb = timed("convert", decoded, lambda image: images.pixels(image, "RGB"))
        pixels = timed("augment", rgb, dataset.transform)
        labelled = [(image, label) for image, (_, label) in zip(pixels, read, strict=True)]
        batches = timed("collate, mix", [labelled], loader.loader.collate_fn)
        whole, loader.loader = loader.loader, batches
        timed("normalise, erase", [loader], list)  # its own loop over what the workers gave it
        loader.loader = whole
    used = len(order) // batch_size * batch_size
    return {name: 1e3 * seconds / used for name, seconds in spent.items()}


class Timed:
    """A loader that ends after some seconds, and knows how long it was waited for.

    Args:
        loader: Of a run.
        skip: Batches before the clock starts.
        seconds: Time on the clock.
    """

    def __init__(self, loader: Any, skip: int, seconds: float) -> None:
        self.loader, self.skip, self.seconds = loader, skip, seconds
        self.images = 0
        self.waited = self.total = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        source = iter(self.loader)
        for _ in range(self.skip):
            yield next(source)
        begin = asked = time.perf_counter()
        for batch in source:
            now = time.perf_counter()
            self.waited += now - asked
            self.total = now - begin
            self.images += len(batch[0])
            yield batch
            asked = time.perf_counter()
            if self.total > self.seconds:
                self.total = asked - begin
                return
        raise SystemExit("the epoch ended before the time was over: more --images")


def loading(made: setup.Run, seconds: float) -> dict[str, float]:
    """Images per second of the loader alone."""
    start_epoch(made.train_loader, 0, 0)
    timed = Timed(made.train_loader, ahead(made), seconds)
    for _ in timed:
        pass
    return {"images_per_s": timed.images / timed.total}


def training(made: setup.Run, seconds: float) -> dict[str, float]:
    """Images per second of training, and the share of time in which there was no batch."""
    start_epoch(made.train_loader, 0, 0)
    timed = Timed(made.train_loader, ahead(made), seconds)
    train_one_epoch(made.updater, timed, made.autocast)
    return {"images_per_s": timed.images / timed.total, "data_wait": timed.waited / timed.total}


def ahead(made: setup.Run) -> int:
    """Batches that workers make before the first is asked for, and one in timm's loader."""
    return 2 * made.config.data.workers + 1


def main() -> None:
    """Measure, print tables, write a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--images", type=int, default=1280, help="different files")
    parser.add_argument("--seconds", type=float, default=8, help="per measurement")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--model", default="test_ravlt")
    parser.add_argument("--threads", type=int, default=1, help="of the training process")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # More workers than cores are part of what is measured.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = write_images(root, args.images)
        print(", ".join(f"{key} {value:.4g}" for key, value in data.items()), flush=True)
        cost = costs(make_run(root, args, 0), args.images)
        cost["sum"] = sum(cost.values())
        print(f"\n| {' | '.join(cost)} |\n|{' --- |' * len(cost)}")
        print(f"| {' | '.join(f'{value:.2f}' for value in cost.values())} | (ms per image)\n")
        rows = []
        print("| workers | loading, images/s | training, images/s | waiting for data |")
        print("| --- | --- | --- | --- |")
        for workers in args.workers:
            alone = loading(make_run(root, args, workers), args.seconds)
            trained = training(make_run(root, args, workers), args.seconds)
            rows.append(
                {
                    "workers": workers,
                    "loading_images_per_s": alone["images_per_s"],
                    "training_images_per_s": trained["images_per_s"],
                    "data_wait": trained["data_wait"],
                }
            )
            print(
                f"| {workers} | {alone['images_per_s']:.0f} | {trained['images_per_s']:.1f} | "
                f"{trained['data_wait']:.1%} |",
                flush=True,
            )
    if args.output:
        record = {
            "command": f"python benchmarks/loader.py --workers {' '.join(map(str, args.workers))} "
            f"--images {args.images} --seconds {args.seconds:g} --batch {args.batch} "
            f"--model {args.model} --threads {args.threads}",
            "machine": f"{machine()}; {args.threads} threads used by the training process",
            "commit": commit(),
            "torch": torch.__version__,
            "pillow": Image.__version__,
            "vitlinear": vitlinear.__version__,
            "images": data,
            "cost_ms_per_image": cost,
            "rows": rows,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
