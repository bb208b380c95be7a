"""``vitlinear predict --task detection|segmentation``: what models of mmdet and mmseg see."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from PIL import Image
from torch import nn
from tqdm import tqdm

from vitlinear.checkpoints.read import read_checkpoint
from vitlinear.cli.device import choose_device
from vitlinear.cli.parser import Parser
from vitlinear.data.bad_images import BadImages, add_bad_images_flag
from vitlinear.data.images import DAMAGE, UnreadableImage, pixels
from vitlinear.data.listing import find_images
from vitlinear.errors import UserError, one_line
from vitlinear.files import check_parent, write_atomically, write_text

from ..draw import Color, color_of, draw_classes, draw_detections
from .checks import backbones, check_config
from .packages import require
from .runner import add_config_flags, load_weights, processes, read_config

Result = dict[str, Any]


def detect(argv: Sequence[str] | None, prog: str = "vitlinear predict --task detection") -> None:
    """Draw boxes, and masks where the model has them."""
    parser = _parser(prog, "Find objects with a detector of mmdet.")
    parser.add_argument(
        "--score-thr", type=float, default=0.3, metavar="S", help="leave out what scores less"
    )
    args = parser.parse_args(argv)
    apis, _ = require("mmdet.apis", "mmcv.ops")
    results = _check(args)
    model, names, _ = load_model(args, "mmdet")

    def predict(image: Image.Image, stem: Path) -> Result:
        found = apis.inference_detector(model, _as_bgr(image)).get("pred_instances")
        if found is None:
            raise UserError(f"config {args.config} makes no detector: it predicts no boxes")
        found = found[found.scores >= args.score_thr].cpu()
        indices, scores = found.labels.tolist(), found.scores.tolist()
        detections: list[Result] = [
            {"class": names[index], "index": index, "score": score, "box": box}
            for index, score, box in zip(indices, scores, found.bboxes.tolist(), strict=True)
        ]
        masks = torch.as_tensor(found.masks, dtype=torch.bool) if "masks" in found else None
        if masks is not None:
            for detection, mask in zip(detections, masks.numpy(), strict=True):
                detection["segmentation"] = _run_lengths(mask)
        labels = [f"{item['class']} {item['score']:.0%}" for item in detections]
        drawn = draw_detections(image, found.bboxes, indices, labels, masks)
        return {"drawn": _save(drawn, stem), "detections": detections}

    def summary(result: Result) -> str:
        counts = Counter(item["class"] for item in result["detections"])
        return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"

    _run(args, results, predict, summary)


def segment(
    argv: Sequence[str] | None, prog: str = "vitlinear predict --task segmentation"
) -> None:
    """Draw label maps, and write them beside the drawings, a pixel being its class's index."""
    args = _parser(prog, "Name the class of each pixel with a segmentor of mmseg.").parse_args(argv)
    apis, _ = require("mmseg.apis", "mmcv.ops")
    results = _check(args)
    model, names, palette = load_model(args, "mmseg")

    def predict(image: Image.Image, stem: Path) -> Result:
        found = apis.inference_model(model, _as_bgr(image)).get("pred_sem_seg")
        if found is None:
            raise UserError(f"config {args.config} makes no segmentor: it predicts no label map")
        labels = found.data[0].cpu().numpy()
        label_map = Image.fromarray(labels.astype(np.uint8 if len(names) <= 256 else np.uint16))
        present, counts = np.unique(labels, return_counts=True)
        classes = [
            {"class": names[index], "index": index, "share": count / labels.size}
            for index, count in zip(present.tolist(), counts.tolist(), strict=True)
        ]
        return {
            "drawn": _save(draw_classes(image, labels, names, palette), stem),
            "label_map": _save(label_map, stem.with_name(f"{stem.name}_labels")),
            "classes": sorted(classes, key=lambda item: -item["share"]),
        }

    def summary(result: Result) -> str:
        return ", ".join(f"{item['class']} {item['share']:.1%}" for item in result["classes"])

    _run(args, results, predict, summary)


def load_model(
    args: argparse.Namespace, framework: str
) -> tuple[nn.Module, list[str], list[Color]]:
    """Build what a config says, with all weights from a checkpoint, ready to predict.

    Args:
        args: ``config``, ``cfg_options``, ``checkpoint``, ``device``.
        framework: ``mmdet`` or ``mmseg``, where the config names no scope.

    Returns:
        Model, class names and palette: those that the checkpoint holds, else those of the config's
        test data; colours of ours where neither has any.

    Raises:
        UserError: A file cannot be read, or the checkpoint is one of another model.
    """
    config, content = read_config(args, framework), read_checkpoint(args.checkpoint)
    for _, backbone in backbones(config):
        backbone.update(pretrained=False, init_cfg=None)
    check_config(config, ())
    with processes("none"):
        init_default_scope(config.get("default_scope", framework))
        model = revert_sync_batchnorm(MODELS.build(config.model))
        meta = content.get("meta", {}).get("dataset_meta") or _meta_of_data(config)
    load_weights(model, content.get("state_dict", content), args.checkpoint)
    model.cfg = config
    model.to(choose_device(args.device)).eval()
    meta = {key.lower(): value for key, value in meta.items()}
    names = list(meta.get("classes") or ())
    if not names:
        raise UserError(
            f"neither {args.checkpoint} nor {args.config} names the classes: "
            "--cfg-options test_dataloader.dataset.metainfo.classes=..."
        )
    palette = meta.get("palette")
    if not isinstance(palette, list | tuple) or len(palette) != len(names):
        palette = [color_of(index) for index in range(len(names))]
    return model, names, [tuple(color) for color in palette]


def _meta_of_data(config: Config) -> dict[str, Any]:
    """The names that the class of the test data has, or the config gives it."""
    data = config.get("test_dataloader", {}).get("dataset", {})
    while "dataset" in data:
        data = data["dataset"]
    kind = DATASETS.get(data["type"]) if "type" in data else None
    return {**getattr(kind, "METAINFO", {}), **data.get("metainfo", {})}


def _parser(prog: str, description: str) -> Parser:
    parser = Parser(prog=prog, description=description)
    add_config_flags(parser, "checkpoint")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, or folders (recursive)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for the drawings")
    parser.add_argument(
        "--device", default=None, metavar="DEV", help="default: cuda if there is one"
    )
    parser.add_argument("--json", action="store_true", help="JSON on standard output")
    parser.add_argument("--results-file", default=None, metavar="FILE", help="JSON to a file")
    add_bad_images_flag(parser)
    # What a config is read with, and has no meaning here.
    parser.set_defaults(work_dir=None, launcher="none")
    return parser


def _check(args: argparse.Namespace) -> list[Result]:
    """``file`` of each image, all of which were read once, or why not as ``unreadable``."""
    check_parent(args.results_file)
    bad_images = BadImages.by_flag(args.bad_images)
    results: list[Result] = []
    for file in find_images(args.images):
        results.append({"file": str(file)})
        try:
            _read(file)
        except UnreadableImage as error:
            bad_images.add(error)
            results[-1]["unreadable"] = error.reason
    if all("unreadable" in result for result in results):
        first = f"{results[0]['file']}: {results[0]['unreadable']}"
        raise UserError(f"none of {len(results)} images could be read; {first}")
    return results


def _run(
    args: argparse.Namespace,
    results: list[Result],
    predict: Callable[[Image.Image, Path], Result],
    summary: Callable[[Result], str],
) -> None:
    folder = Path(args.out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {one_line(error)}") from error
    taken: Counter[str] = Counter()
    readable = [result for result in results if "unreadable" not in result]
    for result in tqdm(readable, desc="predict", leave=False, disable=None):
        file = Path(result["file"])
        taken[file.stem] += 1
        # files of the same name from two folders
        stem = file.stem if taken[file.stem] == 1 else f"{file.stem}-{taken[file.stem]}"
        result.update(predict(_read(file), folder / stem))
    text = json.dumps(results, indent=2)
    if args.results_file:
        write_text(Path(args.results_file).expanduser(), text + "\n")
    if args.json:
        print(text)
    elif not args.results_file:
        for result in results:
            if "unreadable" in result:
                print(f"left out: {result['file']}: {result['unreadable']}")
            else:
                print(f"{result['file']}: {summary(result)}; {result['drawn']}")


def _read(path: Path) -> Image.Image:
    """An image, upright, RGB."""
    try:
        return pixels(path.read_bytes(), "RGB")
    except DAMAGE as error:
        raise UnreadableImage(path, error) from error


def _as_bgr(image: Image.Image) -> np.ndarray:
    """[H, W, 3] in the order of colours that OpenMMLab's pipelines start from."""
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])


def _save(image: Image.Image, stem: Path) -> str:
    path = stem.with_name(f"{stem.name}.png")  # not with_suffix: a stem may have dots
    write_atomically(path, lambda temporary: image.save(temporary, "PNG"))
    return str(path)


def _run_lengths(mask: np.ndarray) -> Result:
    """A mask as COCO compresses it."""
    from pycocotools import mask as coco

    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}
