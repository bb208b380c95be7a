"""Trees on a held-out aerial photograph: average precision, and a picture of what is found.

    pip download --no-deps deepforest
    python tools/deepforest_to_coco.py deepforest-*.whl data/deepforest
    python benchmarks/deepforest.py --output benchmarks/results/deepforest_cpu.json

Trains with the configuration for deepforest, goes on where it was stopped, tests on the held-out
tiles, and draws one of them: on the left what deepforest's authors annotated, on the right what the
detector finds.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import mmdet
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout

from benchmarks.attention import commit, machine  # noqa: E402
from vitlinear.cli.flags import path  # noqa: E402
from vitlinear.cli.parser import Parser  # noqa: E402
from vitlinear.files import check_results  # noqa: E402
from vitlinear_cli import main as vitlinear  # noqa: E402
from vitlinear_cli import run as run_script  # noqa: E402

CONFIG = "configs/detection/retinanet_test-ravlt_fpn_deepforest.py"
DATA = Path("data/deepforest")
TILE = "2019_YELL_2_541000_4977000_image_crop_312_345.jpg"
SCORE = 0.3
MAGNIFIED = 1.5


def run(*arguments: object) -> None:
    """Runs a ``vitlinear`` command and ends with it if it fails."""
    code = vitlinear([str(item) for item in arguments])
    if code:
        sys.exit(code)


def boxes_of_tile() -> list[list[float]]:
    """Left, upper, right, lower edges of the annotated trees."""
    data = json.loads((DATA / "annotations" / "instances_val.json").read_text())
    (image,) = (image for image in data["images"] if image["file_name"] == TILE)
    found = [item for item in data["annotations"] if item["image_id"] == image["id"]]
    return [[x, y, x + w, y + h] for x, y, w, h in (item["bbox"] for item in found)]


def draw(boxes: list[list[float]], color: str) -> Image.Image:
    """The tile, magnified, with boxes."""
    with Image.open(DATA / "images" / TILE) as image:
        drawn = image.resize([round(side * MAGNIFIED) for side in image.size], Image.LANCZOS)
    canvas = ImageDraw.Draw(drawn)
    for box in boxes:
        canvas.rectangle([value * MAGNIFIED for value in box], outline=color, width=2)
    return drawn


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is left to train, tests, draws and writes."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=path, required=True, help="JSON; a JPEG goes beside it")
    parser.add_argument("--work-dir", type=path, default=Path("output/deepforest"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    os.chdir(ROOT)
    beside = args.output.parent / f"{args.output.stem}.jpg"
    check_results({"--output": args.output, "the JPEG beside it": beside})
    last = args.work_dir / "last_checkpoint"
    run("train-detector", CONFIG, "--work-dir", args.work_dir, "--resume")
    checkpoint = Path(last.read_text())
    results = args.work_dir / "test"
    run("test-detector", CONFIG, checkpoint, "--work-dir", results)
    metrics = json.loads(max(results.glob("*/*.json")).read_text())
    found = args.work_dir / "found.json"
    images = (DATA / "images" / TILE, "--out", args.work_dir / "drawn")
    flags = ("--score-thr", SCORE, "--results-file", found)
    run("predict", "--task", "detection", CONFIG, checkpoint, *images, *flags)
    detections = json.loads(found.read_text())[0]["detections"]

    truth = draw(boxes_of_tile(), "white")
    right = draw([item["box"] for item in detections], "yellow")
    picture = Image.new("RGB", (2 * truth.width + 4, truth.height), "white")
    picture.paste(truth, (0, 0))
    picture.paste(right, (truth.width + 4, 0))
    picture.save(beside, quality=85)
    record = {
        "command": f"python benchmarks/deepforest.py --output {args.output}",
        "machine": f"{machine()}, 1 thread used",
        "commit": commit(),
        "torch": torch.__version__,
        "mmdet": mmdet.__version__,
        "config": CONFIG,
        "checkpoint": checkpoint.name,
        "AP50": metrics["coco/bbox_mAP_50"],
        "AP": metrics["coco/bbox_mAP"],
        "tile": {"name": TILE, "annotated": len(boxes_of_tile()), "found": len(detections)},
        "score_threshold": SCORE,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    sys.exit(run_script(main))
