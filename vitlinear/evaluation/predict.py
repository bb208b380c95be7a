"""The ``predict`` command: the likeliest classes of image files."""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset
from torch import nn
from tqdm import tqdm

from vitlinear.checkpoints.card import Card
from vitlinear.cli import flags as arguments
from vitlinear.cli.device import choose_device, make_autocast
from vitlinear.cli.flags import add_checkpoint_argument
from vitlinear.cli.parser import Parser
from vitlinear.data.bad_images import BadImages
from vitlinear.data.images import DAMAGE, UnreadableImage, convert, decode, find_images
from vitlinear.errors import UserError
from vitlinear.files import check_parent, write_text

from .validate import checkpoint_or_model, image_mode


def parse_arguments(
    argv: Sequence[str] | None, prog: str = "vitlinear predict"
) -> argparse.Namespace:
    """Parses flags."""
    parser = Parser(
        prog=prog,
        description="Classify image files. A checkpoint of `vitlinear train` knows everything "
        "else; other weights need --model, and --pretrained fetches a model's own.",
        epilog="`vitlinear predict --task detection --help`, or segmentation: with models of mmdet "
        "and mmseg.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, or folders (recursive)")
    add_checkpoint_argument(parser)
    arguments.add_model_arguments(parser, default=None)
    arguments.add_input_arguments(parser)
    arguments.add_bad_images_argument(parser)
    arguments.add_device_arguments(parser)
    group = parser.add_argument_group("report")
    group.add_argument("--topk", type=arguments.COUNT, default=5, metavar="K", help="classes shown")
    group.add_argument("-b", "--batch-size", type=arguments.COUNT, default=64)
    group.add_argument("--json", action="store_true", help="JSON on standard output")
    group.add_argument("--results-file", default=None, metavar="FILE", help="JSON to a file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None, prog: str = "vitlinear predict") -> None:
    """Runs the command; prints nothing before every image was looked at."""
    args = parse_arguments(argv, prog)
    check_parent(args.results_file)
    results = predict(args)
    text = json.dumps(results, indent=2)
    if args.results_file:
        write_text(Path(args.results_file).expanduser(), text + "\n")
    if args.json:
        print(text)
    elif not args.results_file:
        for result in results:
            print(_line(result))


def _line(result: dict[str, Any]) -> str:
    if "unreadable" in result:
        return f"left out: {result['file']}: {result['unreadable']}"
    shown = ", ".join(
        f"{guess['class']} {100 * guess['probability']:.1f} %" for guess in result["predictions"]
    )
    return f"{result['file']}: {shown}"


def predict(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Classifies images as ``args`` say.

    Returns:
        Per image ``file`` and ``predictions``, a list of ``class``, ``index``, ``probability``
        with the likeliest first; in their place, for an image left out, the reason as
        ``unreadable``.
    """
    files = find_images(args.images)
    if not args.checkpoint and not args.pretrained:
        raise UserError("no weights: give --checkpoint FILE, or --model NAME --pretrained")
    device = choose_device(args.device)
    model, card, config = checkpoint_or_model(args)
    names = _class_names(model, card)
    mode = image_mode(args, card, config["input_size"][0])
    transform = create_transform(**config, is_training=False)
    layout = torch.channels_last if args.channels_last else torch.preserve_format
    model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    autocast = make_autocast(args, device)
    topk = min(args.topk, len(names))
    bad_images = BadImages(skip=args.bad_images == "skip")
    results: list[dict[str, Any]] = [{"file": str(file)} for file in files]
    batches = range(0, len(files), args.batch_size)
    for start in tqdm(batches, desc="predict", leave=False, disable=None):
        chunk = results[start : start + args.batch_size]
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
            yield result, convert(decode(Path(result["file"]).read_bytes()), mode)
        except DAMAGE as error:
            unreadable = UnreadableImage(result["file"], error)
            bad_images.add(unreadable)
            result["unreadable"] = unreadable.reason


def _class_names(model: nn.Module, card: Card | None) -> list[str]:
    """Returns names for the model's outputs: trained, or ImageNet's, or else numbers."""
    if card is not None and card.class_names:
        return card.class_names
    count = int(model.num_classes)  # type: ignore[arg-type]
    subset = infer_imagenet_subset(model) if card is None else None
    if subset:
        info = ImageNetInfo(subset)
        return [info.index_to_description(index) for index in range(count)]
    return [str(index) for index in range(count)]
