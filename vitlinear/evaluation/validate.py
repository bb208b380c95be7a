"""The ``validate`` command: loss, top-1 and top-5 of a checkpoint or a timm model."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from vitlinear.data.class_folders import split_in
from vitlinear.data.class_names import check_same_classes, classes_of
from vitlinear.data.dataset import DataConfig, add_data_flags, image_mode, open_split
from vitlinear.data.loader import eval_loader
from vitlinear.errors import UserError
from vitlinear.files import check_parent, write_text

from .evaluate import Evaluator, PerClass, evaluate
from .load_or_build import load_or_build


@dataclass(frozen=True)
class ValidateConfig:
    """Model, data set and report of ``validate``."""

    checkpoint: str | None
    data: DataConfig
    bad_images: str
    model: ModelConfig
    input: InputConfig
    device: DeviceConfig
    batch_size: int
    per_class: bool
    results_file: str | None


def parse_arguments(argv: Sequence[str] | None, prog: str = "vitlinear validate") -> ValidateConfig:
    """Parses flags."""
    parser = Parser(
        prog=prog,
        description="Accuracy and loss on a held-out set. A checkpoint of `vitlinear train` knows "
        "its model, its input and, unless it was a folder, its data set, but not where that lies: "
        "--data-dir.",
    )
    add_checkpoint_flag(parser)
    add_data_flags(parser)
    add_bad_images_flag(parser)
    add_model_flags(parser, default=None)
    add_input_flags(parser)
    add_device_flags(parser)
    group = parser.group("report")
    group.add_argument("-b", "--batch-size", type=COUNT, default=256)
    group.add_argument("--per-class", action="store_true", help="a table with each class")
    group.add_argument("--results-file", default=None, metavar="FILE", help="numbers as JSON")
    return from_arguments(ValidateConfig, parser.parse_args(argv))


def main(argv: Sequence[str] | None, prog: str = "vitlinear validate") -> None:
    """Runs the command."""
    config = parse_arguments(argv, prog)
    check_parent(config.results_file, (config.checkpoint, config.data.class_map))
    metrics = validate(config)
    print(
        f"top-1 {metrics['top1']:.2f} %, top-5 {metrics['top5']:.2f} %, loss {metrics['loss']:.4f} "
        f"on {metrics['images']} images"
    )
    for name, reason in sorted(metrics.get("unreadable", {}).items()):
        print(f"left out: {name}: {reason}")
    if config.per_class:
        print(_table(metrics["per_class"]))
    if config.results_file:
        write_text(Path(config.results_file).expanduser(), json.dumps(metrics, indent=2) + "\n")


def validate(config: ValidateConfig) -> dict[str, Any]:
    """Evaluates a model on a held-out set.

    Returns:
        ``model``, ``checkpoint``, ``images``, ``loss``, ``top1``, ``top5``; with ``per_class``
        also ``per_class``, a list of ``class``, ``images``, ``correct``, ``top1``; where images
        were left out, ``unreadable``, their reasons by name.

    Raises:
        UserError: Model and data do not go together, or the flags cannot work.
    """
    device = choose_device(config.device.device)
    model, card, input = load_or_build(config.checkpoint, config.model, config.input)
    data = config.data
    if card is not None and _is_meant(card.dataset, data):
        data = dataclasses.replace(data, dataset=card.dataset)
    trained_mode = card.image_mode if card else None
    bad_images = BadImages.by_flag(config.bad_images)
    dataset = open_split(
        data,
        data.val_split,
        train=False,
        mode=image_mode(input.input_size[0], data.input_img_mode or trained_mode),
        batch_size=config.batch_size,
        num_classes=config.model.num_classes,
        bad_images=bad_images,
    )
    for note in getattr(dataset, "notes", ()):
        print(note, file=sys.stderr)
    names = classes_of(dataset)
    num_classes = int(model.num_classes)  # type: ignore[arg-type]
    if names is not None and len(names) != num_classes:
        raise UserError(
            f"the model has {num_classes} classes, the data {len(names)}: give the data set it was "
            "trained on, or all its classes with --class-map"
        )
    if card is not None:
        check_same_classes(card.class_names, names, "the checkpoint", "the data set")
    loader = eval_loader(
        dataset,
        batch_size=config.batch_size,
        data_config=input,
        workers=data.workers,
        device=device,
        pin_memory=data.pin_mem,
    )
    counter = PerClass(num_classes, device) if config.per_class else Evaluator(device)
    metrics = evaluate(
        model.to(device=device, memory_format=config.device.memory_format),  # type: ignore[call-overload]
        loader,
        make_autocast(config.device, device),
        evaluator=counter,
        title="validate",
        channels_last=config.device.channels_last,
    )
    report: dict[str, Any] = {
        "model": card.model if card else config.model.model,
        "checkpoint": config.checkpoint,
        "images": counter.num_samples,
        **metrics,
    }
    if counter.unreadable:
        report["unreadable"] = bad_images.collect()
    if isinstance(counter, PerClass):
        labels = names or [str(label) for label in range(num_classes)]
        report["per_class"] = [
            {
                "class": name,
                "images": images,
                "correct": correct,
                "top1": 100 * correct / images if images else None,
            }
            for name, images, correct in zip(
                labels, counter.images.tolist(), counter.correct.tolist(), strict=True
            )
        ]
    return report


def _is_meant(dataset: str | None, data: DataConfig) -> bool:
    """Whether the data set that a checkpoint was trained on is the one to evaluate on.

    A folder of images in its stead is known by its split.
    """
    if dataset is None or data.dataset is not None:
        return False
    if data.data_dir is None:
        return True
    # digits lie in no folder: one that is given was meant for images.
    return dataset != "digits" and not split_in(Path(data.data_dir).expanduser(), data.val_split)


def _table(rows: list[dict[str, Any]]) -> str:
    width = max(5, *(len(row["class"]) for row in rows))
    lines = [f"{'class':<{width}}  {'images':>7}  {'correct':>7}  {'top-1 %':>7}"]
    for row in rows:
        top1 = "-" if row["top1"] is None else f"{row['top1']:.2f}"
        lines.append(f"{row['class']:<{width}}  {row['images']:>7}  {row['correct']:>7}  {top1:>7}")
    return "\n".join(lines)
