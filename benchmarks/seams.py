"""Seams of independent tiles on an aerial photograph, against the same model streamed.

    pip download --no-deps deepforest
    python benchmarks/seams.py deepforest-*.whl --output benchmarks/results/seams_cpu.json

A small segmentor learns where tree crowns are from the smaller photographs of the package, whose
boxes it takes for masks. Then the large photograph runs in two ways: streamed, which gives what the
whole photograph gives, and as tiles of 512 x 512 pixels that know nothing of each other. The PNG
beside the JSON shows both and their difference.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout

import vitlinear  # noqa: E402
from benchmarks.attention import commit, machine  # noqa: E402
from vitlinear.cli.flags import path  # noqa: E402
from vitlinear.cli.parser import Parser  # noqa: E402
from vitlinear.dense.deepforest import _unpack, read_annotations  # noqa: E402
from vitlinear.files import check_results  # noqa: E402
from vitlinear.streaming import Head  # noqa: E402
from vitlinear_cli import run  # noqa: E402

LARGE = "2019_YELL_2_528000_4978000_image_crop2"
MODEL = "test_ravlt_linear"
TILE, CROP, BATCH = 512, 256, 4
STRIDE = 4  # pixels in a place of the logits
SIDE = 320  # of a panel of the picture


class SumHead(nn.Module):
    """Maps of four scales, each through a linear layer, brought to the finest and added."""

    def __init__(self, channels: list[int], classes: int) -> None:
        super().__init__()
        self.linear = nn.ModuleList(nn.Conv2d(width, classes, 1) for width in channels)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps [B, C_i, h_i, w_i] -> logits of the size of the first."""
        parts = [linear(x) for linear, x in zip(self.linear, maps, strict=True)]
        size = parts[0].shape[2:]
        return torch.stack([F.interpolate(x, size=size, mode="bilinear") for x in parts]).sum(0)


def photographs(wheel: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pixels [H, W, 3] of each annotated photograph, and where its boxes are, [H, W]."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for path, boxes in read_annotations(_unpack(wheel, Path(folder))).items():
            with Image.open(path) as file:
                pixels = np.asarray(file.convert("RGB"))
            trees = np.zeros(pixels.shape[:2], bool)
            for box in boxes:
                left, upper, right, lower = (round(value) for value in box[:4])
                trees[upper:lower, left:right] = True
            found[path.stem] = pixels, trees
    return found


def normalised(pixels: np.ndarray, model: nn.Module) -> Tensor:
    """An image [3, H, W] as the model takes it."""
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    return (torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1) / 255 - mean) / std


def train(
    model: nn.Module, head: nn.Module, pictures: list[tuple[np.ndarray, np.ndarray]], steps: int
) -> float:
    """Train both on random crops; the mean loss of the last tenth of the steps."""
    generator = np.random.default_rng(0)
    parameters = [*model.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    weights = np.array([pixels.shape[0] * pixels.shape[1] for pixels, _ in pictures], float)
    losses = []
    model.train()
    for _ in range(steps):
        images, targets = [], []
        for _ in range(BATCH):
            pixels, trees = pictures[generator.choice(len(pictures), p=weights / weights.sum())]
            top, left = (int(generator.integers(0, n - CROP + 1)) for n in trees.shape)
            turns, flips = int(generator.integers(4)), int(generator.integers(2))
            part = slice(top, top + CROP), slice(left, left + CROP)
            image, target = (np.rot90(x[part], turns)[:, :: 1 - 2 * flips] for x in (pixels, trees))
            images.append(normalised(image, model))
            targets.append(torch.from_numpy(target.copy()).float())
        logits = head(model.forward_intermediates(torch.stack(images), intermediates_only=True))
        target = F.avg_pool2d(torch.stack(targets)[:, None], STRIDE)
        loss = F.binary_cross_entropy_with_logits(logits, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return float(np.mean(losses[-max(steps // 10, 1) :]))


@torch.no_grad()
def direct(model: nn.Module, head: nn.Module, pixels: np.ndarray) -> Tensor:
    """Logits [h, w] of an image that runs as a whole."""
    maps = model.forward_intermediates(normalised(pixels, model)[None], intermediates_only=True)
    return head(maps)[0, 0]


def tiled(model: nn.Module, head: nn.Module, pixels: np.ndarray) -> Tensor:
    """Logits [h, w] of tiles that run by themselves."""
    height, width, _ = pixels.shape
    rows = [
        torch.cat(
            [
                direct(model, head, pixels[top : top + TILE, left : left + TILE])
                for left in range(0, width, TILE)
            ],
            1,
        )
        for top in range(0, height, TILE)
    ]
    return torch.cat(rows)


def seam_distance(height: int, width: int) -> Tensor:
    """Places between each place and the nearest seam, [h, w]; 0 beside it."""
    tile = TILE // STRIDE

    def along(length: int) -> Tensor:
        places = torch.arange(length)
        seams = torch.arange(tile, length, tile)
        after = places[:, None] - seams
        return torch.where(after >= 0, after, -1 - after).min(1).values

    return torch.minimum(along(height)[:, None], along(width)[None])


def panel(values: Tensor) -> Image.Image:
    """Values from 0 to 1 as an image of grey."""
    grey = (255 * values.clamp(0, 1)).byte().numpy()
    return Image.fromarray(grey).resize((SIDE, round(SIDE * grey.shape[0] / grey.shape[1])))


def draw(pixels: np.ndarray, whole: Tensor, tiles: Tensor, path: Path) -> float:
    """Photograph, streamed, tiles, difference of probabilities; the difference that is white."""
    probabilities = [x.sigmoid() for x in (whole, tiles)]
    difference = (probabilities[0] - probabilities[1]).abs()
    white = float(difference.quantile(0.995))
    panels = [panel(x).convert("RGB") for x in (*probabilities, difference / white)]
    panels.insert(0, Image.fromarray(pixels).resize(panels[0].size))
    width, height = panels[0].size
    picture = Image.new("RGB", (4 * width + 12, height), "white")
    for place, part in enumerate(panels):
        picture.paste(part, (place * (width + 4), 0))
    picture.quantize(64).save(path, optimize=True)
    return white


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, runs both ways, compares, draws and writes."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=path, help="deepforest's, from pip download --no-deps")
    parser.add_argument("--output", type=path, required=True, help="JSON; a PNG goes beside it")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args(argv)
    picture = args.output.parent / f"{args.output.stem}.png"
    check_results({"--output": args.output, "the PNG beside it": picture}, [args.wheel])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pictures = photographs(args.wheel)
    pixels, trees = pictures.pop(LARGE)
    height, width = (n // 32 * 32 for n in trees.shape)
    pixels, trees = pixels[:height, :width], trees[:height, :width]
    large_enough = [p for p in pictures.values() if min(p[1].shape) >= CROP]

    model: nn.Module = timm.create_model(MODEL)
    head = SumHead([level["num_chs"] for level in model.feature_info], 1)
    began = time.time()
    loss = train(model, head, large_enough, args.steps)
    print(f"trained on {len(large_enough)} photographs in {time.time() - began:.0f} s: {loss:.3f}")

    streamed = vitlinear.stream(
        model, pixels, output=Head(head.eval(), (0, 1, 2, 3)), memory="1200MiB"
    )[0, 0]
    whole = direct(model, head, pixels)
    tiles = tiled(model, head, pixels)
    white = draw(pixels, streamed, tiles, picture)

    target = F.avg_pool2d(torch.from_numpy(trees)[None, None].float(), STRIDE)[0, 0] > 0.5
    difference = (streamed.sigmoid() - tiles.sigmoid()).abs()
    distance = seam_distance(*difference.shape)
    bands = {"beside a seam": (0, 1), "1 to 7": (1, 8), "8 to 31": (8, 32), "32 to 63": (32, 64)}

    def steps_at(logits: Tensor) -> tuple[float, float]:
        """Mean change of probability from one row or column to the next, across seams and else."""
        p = logits.sigmoid()
        across, within = [], []
        for x in (p, p.T):
            change = (x[1:] - x[:-1]).abs().mean(1)
            seam = (torch.arange(1, len(x)) % (TILE // STRIDE)) == 0
            across.append(change[seam])
            within.append(change[~seam])
        return float(torch.cat(across).mean()), float(torch.cat(within).mean())

    record = {
        "command": "python benchmarks/seams.py deepforest-*.whl --output " + str(args.output),
        "machine": f"{machine()}, 1 thread used",
        "commit": commit(),
        "torch": torch.__version__,
        "model": MODEL,
        "photograph": {"name": LARGE, "height": height, "width": width},
        "training": {"photographs": len(large_enough), "steps": args.steps, "loss": loss},
        "intersection_over_union": {
            name: float(((x > 0) & target).sum() / ((x > 0) | target).sum())
            for name, x in (("streamed", streamed), ("tiles", tiles))
        },
        "largest_logit": float(whole.abs().max()),
        "streamed_against_whole": {"largest": float((streamed - whole).abs().max())},
        "tiles_against_streamed": {
            "largest_logit_difference": float((tiles - streamed).abs().max()),
            "mean_probability_difference": float(difference.mean()),
            "other_class": float(((tiles > 0) != (streamed > 0)).float().mean()),
            "mean_probability_difference_by_places_from_a_seam": {
                name: float(difference[(distance >= a) & (distance < b)].mean())
                for name, (a, b) in bands.items()
            },
        },
        "change_to_the_next_place": {
            name: dict(zip(("across_seams", "elsewhere"), steps_at(x), strict=True))
            for name, x in (("streamed", streamed), ("tiles", tiles))
        },
        "picture": {"white_is_a_difference_of": white},
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    sys.exit(run(main))
