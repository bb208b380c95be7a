"""Large images through one process: resident memory and time, streamed and direct.

    python benchmarks/large_images.py --output benchmarks/results/large_images_cpu.json
    python benchmarks/large_images.py --sides 16384 --direct 0 --softmax --disk \\
        --output benchmarks/results/large_images_16384_cpu.json

Every figure comes from a process of its own, which runs one image of random pixels from a file and
writes the features into a file. Resident memory is the most that the system saw of the process,
PyTorch and the model included. The two forms at the smallest size take turns.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout

import vitlinear  # noqa: E402
from benchmarks.attention import commit, machine  # noqa: E402
from vitlinear.streaming.memory import amount  # noqa: E402

SOFTMAX = "vit_small_patch16_224"
ROUNDS = 3  # of the two forms that take turns


def write_image(path: Path, side: int) -> None:
    """An image of random pixels, a few rows at a time."""
    generator = np.random.default_rng(side)
    image = np.lib.format.open_memmap(path, "w+", np.uint8, (side, side, 3))
    for start in range(0, side, 256):
        image[start : start + 256] = generator.integers(0, 256, (256, side, 3), np.uint8)
    image.flush()


def run_alone(form: str, model: str, image: Path, memory: str, threads: int, disk: bool) -> None:
    """Run one image, and print what it took; in a process of its own."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    built = timm.create_model(
        model, **({"dynamic_img_size": True} if form != "stream" and model == SOFTMAX else {})
    ).eval()
    sink = image.with_name("features.npy")
    pixels = np.load(image, mmap_mode="r")
    small = np.ascontiguousarray(pixels[:256, :256])

    def direct(part: np.ndarray) -> None:
        mean, std = (
            torch.tensor(built.pretrained_cfg[key])[:, None, None] for key in ("mean", "std")
        )
        x = (torch.from_numpy(np.array(part)).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            np.save(sink, built.forward_features(x[None]).numpy())

    def stream(part: np.ndarray) -> None:
        with tempfile.TemporaryDirectory(dir=image.parent) as folder:
            workdir = folder if disk else None
            vitlinear.stream(
                built, part, sink, output="features", memory=memory, workdir=workdir, overwrite=True
            )

    run = stream if form == "stream" else direct
    if form == "plain":
        for block in built.blocks:
            block.attn.fused_attn = False
    run(small)  # what happens once in a process is not counted
    began, cpu = time.perf_counter(), time.process_time()
    run(pixels)
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - began,
                "cpu_seconds": time.process_time() - cpu,
                "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


def measure(form: str, model: str, side: int, args: argparse.Namespace) -> dict[str, Any]:
    """Time and memory that one image took, from a process of its own."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        image = Path(folder) / "image.npy"
        write_image(image, side)
        command = [sys.executable, __file__, "--alone", form, "--model", model, "--image", image]
        command += ["--memory", args.memory, "--threads", args.threads, *(["--disk"] * args.disk)]
        done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{form} of {model} at {side} x {side} failed:\n{done.stderr[-2000:]}")
    row = {"form": form, "model": model, "side": side, **json.loads(done.stdout.splitlines()[-1])}
    per_megapixel = row["seconds"] * 2**20 / side**2
    print(
        f"{form:7} {model:24} {side:6} {row['seconds']:9.1f} s {per_megapixel:7.2f} s/megapixel "
        f"{amount(row['resident']):>9} resident",
        flush=True,
    )
    return row


def softmax_needs(side: int) -> dict[str, int]:
    """Of ViT-S with 16 x 16 patches, without a fused attention: bytes and multiply-adds of logits.

    A head has a logit for each pair of tokens. Its softmax is a second tensor of that size.
    """
    tokens, heads, dim, depth = (side // 16) ** 2 + 1, 6, 384, 12
    return {
        "side": side,
        "bytes_of_logits_and_weights": 2 * heads * tokens**2 * 4,
        "multiply_adds_of_attention": 2 * depth * tokens**2 * dim,
    }


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--model", default="ravlt_t_linear")
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", type=int, nargs="*", default=[2048, 4096, 8192])
    parser.add_argument("--direct", type=int, nargs="*", default=[2048], help="sides run directly")
    parser.add_argument("--softmax", type=int, nargs="*", default=[512, 1024, 1536])
    parser.add_argument("--disk", action="store_true", help="keep maps between layers on disk")
    parser.add_argument("--folder", type=Path, help="of images and maps; default: a temporary one")
    parser.add_argument("--alone", choices=("stream", "direct", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--image", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        return run_alone(args.alone, args.model, args.image, args.memory, args.threads, args.disk)
    rows = []
    for side in args.sides:
        turns = ROUNDS if side in args.direct else 1
        for _ in range(turns):
            rows.append(measure("stream", args.model, side, args))
            if side in args.direct:
                rows.append(measure("direct", args.model, side, args))
    rows += [measure("plain", SOFTMAX, side, args) for side in args.softmax]
    record = {
        "command": "python benchmarks/large_images.py " + " ".join(sys.argv[1:]),
        "machine": f"{machine()}, {args.threads} threads used",
        "commit": commit(),
        "torch": torch.__version__,
        "memory": args.memory,
        "rows": rows,
        "softmax_calculated": [
            softmax_needs(side) for side in sorted({*args.sides, *args.softmax})
        ],
    }
    ratios = overheads(rows)
    if ratios:
        record["streamed_over_direct"] = ratios
        print("streamed / direct:", ratios)
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n")


def overheads(rows: list[dict[str, Any]]) -> dict[int, float]:
    """Seconds of the streamed form over those of the direct one by side, median of the turns."""
    found = {}
    for side in {row["side"] for row in rows if row["form"] == "direct"}:
        streamed, direct = (
            [row["seconds"] for row in rows if (row["form"], row["side"]) == (form, side)]
            for form in ("stream", "direct")
        )
        found[side] = statistics.median(a / b for a, b in zip(streamed, direct, strict=True))
    return found


if __name__ == "__main__":
    main()
