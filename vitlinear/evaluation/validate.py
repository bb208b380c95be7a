"""The ``validate`` command: loss, top-1 and top-5 of a checkpoint or a timm model."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitlinear import create as models
from vitlinear.checkpoints.card import Card
from vitlinear.checkpoints.load import load_model
from vitlinear.cli import flags as arguments
from vitlinear.cli.device import choose_device, make_autocast
from vitlinear.cli.parser import Parser
from vitlinear.data import dataset as datasets
from vitlinear.data import loader as loaders
from vitlinear.data.bad_images import BadImages
from vitlinear.errors import UserError
from vitlinear.files import check_parent, write_text

from .evaluate import Evaluator, PerClass, evaluate


def parse_arguments(
    argv: Sequence[str] | None, prog: str = "vitlinear validate"
) -> argparse.Namespace:
    """Parses flags."""
    parser = Parser(
        prog=prog,
        description="Accuracy and loss on a held-out set. A checkpoint of `vitlinear train` knows "
        "its model, its input and, unless it was a folder, its data set.",
    )
    arguments.add_checkpoint_argument(parser)
    arguments.add_data_arguments(parser)
    arguments.add_bad_images_argument(parser)
    arguments.add_model_arguments(parser, default=None)
    arguments.add_input_arguments(parser)
    arguments.add_device_arguments(parser)
    group = parser.add_argument_group("report")
    group.add_argument("-b", "--batch-size", type=arguments.COUNT, default=256)
    group.add_argument("--per-class", action="store_true", help="a table with each class")
    group.add_argument("--results-file", default=None, metavar="FILE", help="numbers as JSON")
    return parser.parse_args(argv)


def checkpoint_or_model(args: argparse.Namespace) -> tuple[nn.Module, Card | None, dict[str, Any]]:
    """Returns the model that flags mean (in eval mode), its card if any, and its data config."""
    in_chans = args.input_size[0] if args.input_size else args.in_chans
    sizes = {"img_size": args.img_size, "input_size": args.input_size}
    models.check_model_kwargs(args.model_kwargs)
    if args.checkpoint:
        if args.pretrained:
            raise UserError("--pretrained and --checkpoint exclude each other")
        model, card = load_model(
            args.checkpoint,
            model=args.model,
            model_kwargs=args.model_kwargs,
            num_classes=args.num_classes,
            in_chans=in_chans,
            **sizes,
        )
    else:
        if args.model is None:
            raise UserError("nothing to run: give --checkpoint FILE, or --model NAME --pretrained")
        card = None
        model = models.build_model(
            args.model,
            pretrained=args.pretrained,
            num_classes=args.num_classes,
            in_chans=in_chans,
            **{**sizes, **args.model_kwargs},
        ).eval()
    asked = {key: value for key, value in vars(args).items() if value is not None}
    if card is None:
        return model, None, models.data_config(model, asked)
    trained = dict(card.data_config)
    if "img_size" in asked or "input_size" in asked:
        del trained["input_size"]
    return model, card, models.data_config(model, {**trained, **asked})


def image_mode(args: argparse.Namespace, card: Card | None, in_chans: int) -> str:
    """Returns the PIL mode: as asked for, or as trained, or the default for the channels."""
    asked = getattr(args, "input_img_mode", None)
    return datasets.image_mode(in_chans, asked or (card.image_mode if card else None))


def main(argv: Sequence[str] | None, prog: str = "vitlinear validate") -> None:
    """Runs the command."""
    args = parse_arguments(argv, prog)
    check_parent(args.results_file)
    metrics = validate(args)
    print(
        f"top-1 {metrics['top1']:.2f} %, top-5 {metrics['top5']:.2f} %, loss {metrics['loss']:.4f} "
        f"on {metrics['images']} images"
    )
    for name, reason in sorted(metrics.get("unreadable", {}).items()):
        print(f"left out: {name}: {reason}")
    if args.per_class:
        print(_table(metrics["per_class"]))
    if args.results_file:
        write_text(Path(args.results_file).expanduser(), json.dumps(metrics, indent=2) + "\n")


def validate(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates as ``args`` say.

    Returns:
        ``model``, ``checkpoint``, ``images``, ``loss``, ``top1``, ``top5``; with ``--per-class``
        also ``per_class``, a list of ``class``, ``images``, ``correct``, ``top1``; where images
        were left out, ``unreadable``, their reasons by name.
    """
    device = choose_device(args.device)
    model, card, config = checkpoint_or_model(args)
    if args.dataset is None and args.data_dir is None and card is not None:
        args.dataset = card.dataset
    mode = image_mode(args, card, config["input_size"][0])
    bad_images = BadImages(skip=args.bad_images == "skip")
    dataset = datasets.open_from_arguments(args, False, mode, bad_images)
    names = datasets.class_names(dataset)
    num_classes = int(model.num_classes)  # type: ignore[arg-type]
    if names is not None and len(names) != num_classes:
        raise UserError(
            f"the model has {num_classes} classes, the data {len(names)}: give the data set it was "
            "trained on, or all its classes with --class-map"
        )
    if card is not None:
        datasets.check_same_classes(card.class_names, names, "the checkpoint", "the data set")
    loader = loaders.eval_loader(
        dataset,
        batch_size=args.batch_size,
        data_config=config,
        workers=args.workers,
        device=device,
        pin_memory=args.pin_mem,
    )
    layout = torch.channels_last if args.channels_last else torch.preserve_format
    counter = PerClass(num_classes, device) if args.per_class else Evaluator(device)
    metrics = evaluate(
        model.to(device=device, memory_format=layout),  # type: ignore[call-overload]
        loader,
        make_autocast(args, device),
        evaluator=counter,
        title="validate",
        channels_last=args.channels_last,
    )
    report: dict[str, Any] = {
        "model": card.model if card else args.model,
        "checkpoint": args.checkpoint,
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


def _table(rows: list[dict[str, Any]]) -> str:
    width = max(5, *(len(row["class"]) for row in rows))
    lines = [f"{'class':<{width}}  {'images':>7}  {'correct':>7}  {'top-1 %':>7}"]
    for row in rows:
        top1 = "-" if row["top1"] is None else f"{row['top1']:.2f}"
        lines.append(f"{row['class']:<{width}}  {row['images']:>7}  {row['correct']:>7}  {top1:>7}")
    return "\n".join(lines)
