"""``vitlinear predict --task detection|segmentation``: what models of mmdet and mmseg see."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from torch import nn
from tqdm import tqdm

from vitlinear.checkpoints.read import read_checkpoint
from vitlinear.cli.device import choose_device
from vitlinear.cli.flags import from_arguments
from vitlinear.cli.parser import Parser
from vitlinear.data.bad_images import BadImages, add_bad_images_flag
from vitlinear.data.images import DAMAGE, UnreadableImage, pixels, printable
from vitlinear.data.listing import find_images
from vitlinear.errors import UserError
from vitlinear.files import (
    ResultPaths,
    check_no_input_folder,
    check_parent,
    make_folder,
    write_atomically,
    write_text,
)

from ..draw import Color, color_of, draw_classes, draw_detections
from .annotations import check_heads, kind_of_data
from .checks import backbones, check_config, without_start_weights
from .packages import require
from .runner import (
    OVERWRITE,
    ConfigArguments,
    add_config_flags,
    dataset_meta,
    load_weights,
    processes,
    read_config,
)

Result = dict[str, Any]


@dataclass(frozen=True)
class PredictArguments:
    """Flags of ``predict --task segmentation``."""

    config: ConfigArguments
    checkpoint: str
    images: tuple[str, ...]
    out: str
    overwrite: bool
    device: str | None
    json: bool
    results_file: str | None
    bad_images: str


@dataclass(frozen=True)
class DetectArguments(PredictArguments):
    """Flags of ``predict --task detection``."""

    score_thr: float


def detect(argv: Sequence[str] | None, prog: str = "vitlinear predict --task detection") -> None:
    """Draw boxes, and masks where the model has them."""
    parser = _parser(prog, "Find objects with a detector of mmdet.")
    parser.add_argument(
        "--score-thr", type=float, default=0.3, metavar="S", help="leave out what scores less"
    )
    arguments = from_arguments(DetectArguments, parser.parse_args(argv))
    apis, _ = require("mmdet.apis", "mmcv.ops")
    results = _check(arguments)
    model, names, _ = load_model(arguments.config, arguments.checkpoint, arguments.device, "mmdet")

    def predict(image: Image.Image, paths: Sequence[Path]) -> Result:
        found = apis.inference_detector(model, _as_bgr(image)).get("pred_instances")
        if found is None:
            raise UserError(
                f"config {arguments.config.config} makes no detector: it predicts no boxes"
            )
        found = found[found.scores >= arguments.score_thr].cpu()
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
        return {"drawn": _save(drawn, paths[0]), "detections": detections}

    def summary(result: Result) -> str:
        counts = Counter(item["class"] for item in result["detections"])
        return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"

    _run(arguments, results, [".png"], predict, summary)


def segment(
    argv: Sequence[str] | None, prog: str = "vitlinear predict --task segmentation"
) -> None:
    """Draw label maps, and write them beside the drawings, a pixel being its class's index."""
    parser = _parser(prog, "Name the class of each pixel with a segmentor of mmseg.")
    arguments = from_arguments(PredictArguments, parser.parse_args(argv))
    apis, _ = require("mmseg.apis", "mmcv.ops")
    results = _check(arguments)
    model, names, palette = load_model(
        arguments.config, arguments.checkpoint, arguments.device, "mmseg"
    )

    def predict(image: Image.Image, paths: Sequence[Path]) -> Result:
        found = apis.inference_model(model, _as_bgr(image)).get("pred_sem_seg")
        if found is None:
            raise UserError(
                f"config {arguments.config.config} makes no segmentor: it predicts no label map"
            )
        labels = found.data[0].cpu().numpy()
        label_map = Image.fromarray(labels.astype(np.uint8 if len(names) <= 256 else np.uint16))
        present, counts = np.unique(labels, return_counts=True)
        classes = [
            {"class": names[index], "index": index, "share": count / labels.size}
            for index, count in zip(present.tolist(), counts.tolist(), strict=True)
        ]
        return {
            "drawn": _save(draw_classes(image, labels, names, palette), paths[0]),
            "label_map": _save(label_map, paths[1]),
            "classes": sorted(classes, key=lambda item: -item["share"]),
        }

    def summary(result: Result) -> str:
        return ", ".join(f"{item['class']} {item['share']:.1%}" for item in result["classes"])

    _run(arguments, results, [".png", "_labels.png"], predict, summary)


def load_model(
    arguments: ConfigArguments, checkpoint: str, device: str | None, framework: str
) -> tuple[nn.Module, list[str], list[Color]]:
    """Build what a config says, with all weights from a checkpoint, ready to predict.

    Args:
        arguments: The config.
        checkpoint: File of the weights.
        device: Name of the device; by default cuda where there is one.
        framework: ``mmdet`` or ``mmseg``, where the config names no scope.

    Returns:
        Model, class names and palette: those that the checkpoint holds, else those of the config's
        test data; colours of ours where neither has any.

    Raises:
        UserError: A file cannot be read, or the checkpoint is one of another model.
    """
    config, _ = read_config(arguments, framework)
    content = read_checkpoint(checkpoint)
    for _, backbone in backbones(config):
        without_start_weights(backbone)
    check_config(config, ())
    with processes("none"):
        scope = config.get("default_scope", framework)
        init_default_scope(scope)
        model = revert_sync_batchnorm(MODELS.build(config.model))
        meta = dataset_meta(content) or _meta_of_data(config, scope)
    load_weights(model, content.get("state_dict", content), checkpoint)
    model.cfg = config
    model.to(choose_device(device)).eval()
    meta = {key.lower(): value for key, value in meta.items()}
    names = list(meta.get("classes") or ())
    if not names:
        raise UserError(
            f"neither {checkpoint} nor {arguments.config} names the classes: "
            "--cfg-options test_dataloader.dataset.metainfo.classes=..."
        )
    check_heads(config, names, checkpoint if dataset_meta(content) else str(arguments.config))
    palette = meta.get("palette")
    if not isinstance(palette, list | tuple) or len(palette) != len(names):
        palette = [color_of(index) for index in range(len(names))]
    return model, names, [tuple(color) for color in palette]


def _meta_of_data(config: Config, scope: str) -> dict[str, Any]:
    """The names that the class of the test data has, or the config gives it."""
    data = config.get("test_dataloader", {}).get("dataset", {})
    while "dataset" in data:
        data = data["dataset"]
    kind = kind_of_data(data, scope)
    return {**getattr(kind, "METAINFO", {}), **data.get("metainfo", {})}


def _parser(prog: str, description: str) -> Parser:
    parser = Parser(prog=prog, description=description)
    add_config_flags(parser, "checkpoint")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, or folders (recursive)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for the drawings")
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    parser.add_argument(
        "--device", default=None, metavar="DEV", help="default: cuda if there is one"
    )
    parser.add_argument("--json", action="store_true", help="JSON on standard output")
    parser.add_argument("--results-file", default=None, metavar="FILE", help="JSON to a file")
    add_bad_images_flag(parser)
    return parser


def _check(arguments: PredictArguments) -> list[Result]:
    """``file`` of each image, all of which were read once, or why not as ``unreadable``."""
    folders = [path for name in arguments.images if (path := Path(name).expanduser()).is_dir()]
    check_no_input_folder(Path(arguments.out), folders)
    bad_images = BadImages.by_flag(arguments.bad_images)
    results: list[Result] = []
    files = find_images(arguments.images)
    check_parent(arguments.results_file, (arguments.checkpoint, arguments.config.config, *files))
    for file in files:
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
    arguments: PredictArguments,
    results: list[Result],
    endings: Sequence[str],
    predict: Callable[[Image.Image, Sequence[Path]], Result],
    summary: Callable[[Result], str],
) -> None:
    folder = Path(arguments.out).expanduser()
    make_folder(folder)
    others = [arguments.checkpoint, arguments.config.config, arguments.results_file]
    inputs = [result["file"] for result in results] + [name for name in others if name]
    paths = ResultPaths(inputs, arguments.overwrite)
    readable = [result for result in results if "unreadable" not in result]
    for result in tqdm(readable, desc="predict", leave=False, disable=None):
        file = Path(result["file"])
        result.update(predict(_read(file), paths.take(folder, file.stem, endings)))
    text = json.dumps(results, indent=2)
    if arguments.results_file:
        write_text(Path(arguments.results_file).expanduser(), text + "\n")
    if arguments.json:
        print(text)
    elif not arguments.results_file:
        for result in results:
            file = printable(result["file"])
            if "unreadable" in result:
                print(f"left out: {file}: {result['unreadable']}")
            else:
                print(f"{file}: {summary(result)}; {printable(result['drawn'])}")


def _read(path: Path) -> Image.Image:
    """An image, upright, RGB."""
    try:
        return pixels(path.read_bytes(), "RGB")
    except DAMAGE as error:
        raise UnreadableImage(path, error) from error


def _as_bgr(image: Image.Image) -> np.ndarray:
    """[H, W, 3] in the order of colours that OpenMMLab's pipelines start from."""
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])


def _save(image: Image.Image, path: Path) -> str:
    write_atomically(path, lambda temporary: image.save(temporary, "PNG"))
    return str(path)


def _run_lengths(mask: np.ndarray) -> Result:
    """A mask as COCO compresses it."""
    from pycocotools import mask as coco

    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}
