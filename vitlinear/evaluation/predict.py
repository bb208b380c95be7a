"""The ``predict`` command: the likeliest classes of image files."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from torch import nn
from tqdm import tqdm

from vitlinear.checkpoints.card import Card
from vitlinear.cli.device import DeviceConfig, add_device_flags, choose_device, make_autocast
from vitlinear.cli.flags import COUNT, from_arguments
from vitlinear.cli.model_flags import (
    InputConfig,
    ModelConfig,
    add_checkpoint_flag,
    add_input_flags,
    add_model_flags,
)
from vitlinear.cli.parser import Parser
from vitlinear.data.bad_images import BadImages, add_bad_images_flag
from vitlinear.data.dataset import add_image_mode_flag, image_mode
from vitlinear.data.images import DAMAGE, UnreadableImage, pixels, printable
from vitlinear.data.listing import find_images
from vitlinear.errors import UserError
from vitlinear.files import check_parent, write_text

from .load_or_build import load_or_build


@dataclass(frozen=True)
class PredictConfig:
    """Images, model and report of ``predict``."""

    images: tuple[str, ...]
    checkpoint: str | None
    model: ModelConfig
    input: InputConfig
    bad_images: str
    input_img_mode: str | None
    device: DeviceConfig
    topk: int
    batch_size: int
    json: bool
    results_file: str | None


def parse_arguments(argv: Sequence[str] | None, prog: str = "vitlinear predict") -> PredictConfig:
    """Parses flags."""
    parser = Parser(
        prog=prog,
        description="Classify image files. A checkpoint of `vitlinear train` knows everything "
        "else; other weights need --model, and --pretrained fetches a model's own.",
        epilog="`vitlinear predict --task detection --help`, or segmentation: with models of mmdet "
        "and mmseg.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, or folders (recursive)")
    add_checkpoint_flag(parser)
    add_model_flags(parser, default=None)
    add_input_flags(parser)
    add_image_mode_flag(parser)
    add_bad_images_flag(parser)
    add_device_flags(parser)
    group = parser.group("report")
    group.add_argument("--topk", type=COUNT, default=5, metavar="K", help="classes shown")
    group.add_argument("-b", "--batch-size", type=COUNT, default=64)
    group.add_argument("--json", action="store_true", help="JSON on standard output")
    group.add_argument("--results-file", default=None, metavar="FILE", help="JSON to a file")
    return from_arguments(PredictConfig, parser.parse_args(argv))


def main(argv: Sequence[str] | None, prog: str = "vitlinear predict") -> None:
    """Runs the command; prints nothing before every image was looked at."""
    config = parse_arguments(argv, prog)
    check_parent(config.results_file)
    results = predict(config)
    text = json.dumps(results, indent=2)
    if config.results_file:
        write_text(Path(config.results_file).expanduser(), text + "\n")
    if config.json:
        print(text)
    elif not config.results_file:
        for result in results:
            print(_line(result))


def _line(result: dict[str, Any]) -> str:
    file = printable(result["file"])
    if "unreadable" in result:
        return f"left out: {file}: {result['unreadable']}"
    shown = ", ".join(
        f"{guess['class']} {100 * guess['probability']:.1f} %" for guess in result["predictions"]
    )
    return f"{file}: {shown}"


def predict(config: PredictConfig) -> list[dict[str, Any]]:
    """Classifies image files.

    Returns:
        Per image ``file`` and ``predictions``, a list of ``class``, ``index``, ``probability``
        with the likeliest first; in their place, for an image left out, the reason as
        ``unreadable``.
    """
    files = find_images(config.images)
    check_parent(config.results_file, (config.checkpoint, *files))
    device = choose_device(config.device.device)
    model, card, input = load_or_build(config.checkpoint, config.model, config.input)
    names = _class_names(model, card, config.model.pretrained)
    trained_mode = card.image_mode if card else None
    mode = image_mode(input.input_size[0], config.input_img_mode or trained_mode)
    transform = create_transform(**input.as_dict(), is_training=False)
    layout = config.device.memory_format
    model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    autocast = make_autocast(config.device, device)
    topk = min(config.topk, len(names))
    bad_images = BadImages.by_flag(config.bad_images)
    results: list[dict[str, Any]] = [{"file": str(file)} for file in files]
    batches = range(0, len(files), config.batch_size)
    for start in tqdm(batches, desc="predict", leave=False, disable=None):
        chunk = results[start : start + config.batch_size]
        opened = [(result, transform(image)) for result, image in _opened(chunk, mode, bad_images)]
        if not opened:
            continue
        images = torch.stack([image for _, image in opened])
        with torch.inference_mode(), autocast():
            logits = model(images.to(device=device, memory_format=layout))
        values, indices = logits.float().softmax(dim=1).topk(topk, dim=1)
        for (result, _), row, places in zip(opened, values.tolist(), indices.tolist(), strict=True):
            result["predictions"] = [
                {"class": names[place], "index": place, "probability": value}
                for value, place in zip(row, places, strict=True)
            ]
    if not any("predictions" in result for result in results):
        first = f"{results[0]['file']}: {results[0]['unreadable']}"
        raise UserError(f"none of {len(files)} images could be read; {first}")
    return results


def _opened(
    results: Sequence[dict[str, Any]], mode: str, bad_images: BadImages
) -> Iterator[tuple[dict[str, Any], Image.Image]]:
    """Yields the images of results; of one that is left out, its result gets the reason."""
    for result in results:
        try:
            yield result, pixels(Path(result["file"]).read_bytes(), mode)
        except DAMAGE as error:
            unreadable = UnreadableImage(result["file"], error)
            bad_images.add(unreadable)
            result["unreadable"] = unreadable.reason


def _class_names(model: nn.Module, card: Card | None, pretrained: bool) -> list[str]:
    """Returns names for the model's outputs: trained, the hub's, ImageNet's, or else numbers.

    ImageNet's are those of published weights for its 1000 classes, which the tag says: only their
    order is everybody's, and a file without a card may be of other classes.
    """
    if card is not None and card.class_names:
        return card.class_names
    count = int(model.num_classes)  # type: ignore[arg-type]
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    named = cfg.get("label_names") or ()
    if len(named) == count:
        described = cfg.get("label_descriptions") or {}
        return [described.get(name, name) for name in named]
    if pretrained and count == 1000 and "in1k" in (cfg.get("tag") or ""):
        info = ImageNetInfo("imagenet-1k")
        return [info.index_to_description(index) for index in range(count)]
    return [str(index) for index in range(count)]
