"""The commands ``train-detector``, ``test-detector``, ``train-segmentor``, ``test-segmentor``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict

from vitlinear.cli.parser import Parser
from vitlinear.errors import UserError

from .annotations import check_annotations
from .checks import backbones, check_config, check_exists
from .packages import require
from .runner import EvaluationRunner, add_common_flags, build_runner, processes, read_config


def train_detector(argv: Sequence[str] | None, prog: str = "vitlinear train-detector") -> None:
    """Train a detector of mmdet."""
    _train(_training_flags(argv, prog, "Train a detector of mmdet."), "mmdet")


def train_segmentor(argv: Sequence[str] | None, prog: str = "vitlinear train-segmentor") -> None:
    """Train a segmentor of mmseg."""
    _train(_training_flags(argv, prog, "Train a segmentor of mmseg."), "mmseg")


def test_detector(argv: Sequence[str] | None, prog: str = "vitlinear test-detector") -> None:
    """Evaluate a detector of mmdet."""
    what, out = "Evaluate a detector of mmdet.", "FILE.pkl"
    args = _test_flags(argv, prog, what, out, "predictions, with the annotations, as a pickle")
    if args.out and not args.out.endswith((".pkl", ".pickle")):
        raise UserError(f"--out {args.out}: the name has to end with .pkl")
    _test(args, "mmdet", _detector_options)


def test_segmentor(argv: Sequence[str] | None, prog: str = "vitlinear test-segmentor") -> None:
    """Evaluate a segmentor of mmseg."""
    what, out = "Evaluate a segmentor of mmseg.", "FOLDER"
    args = _test_flags(argv, prog, what, out, "label maps as PNG files")
    _test(args, "mmseg", _segmentor_options)


def _training_flags(argv: Sequence[str] | None, prog: str, description: str) -> argparse.Namespace:
    parser = Parser(prog=prog, description=description)
    add_common_flags(parser)
    parser.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="mixed precision, on a GPU; by default what the config says",
    )
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="the learning rate follows the batch size of all processes, linearly",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        default=None,
        metavar="FILE",
        help="go on from a checkpoint; without FILE, from the last one in --work-dir",
    )
    return parser.parse_args(argv)


def _train(args: argparse.Namespace, framework: str) -> None:
    require("mmcv.ops", framework)
    config = read_config(args, framework)
    for key in ("train_dataloader", "train_cfg", "optim_wrapper"):
        if not config.get(key):
            raise UserError(f"config {args.config} has no {key}: it trains nothing")
    _set_precision(config, args)
    if args.auto_scale_lr:
        if "base_batch_size" not in config.get("auto_scale_lr", {}):
            raise UserError(f"--auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size")
        config.auto_scale_lr.enable = True
    if args.resume:
        config.resume = True
        config.load_from = None if args.resume == "auto" else args.resume
    if config.get("load_from"):
        check_exists(config.load_from, "set --resume or load_from")
    check_config(config, ("train", "val"))
    check_annotations(config, ("train", "val"), framework)
    with processes(args.launcher):
        build_runner(config).train()


def _set_precision(config: Config, args: argparse.Namespace) -> None:
    wrapper = config.optim_wrapper
    if args.amp:
        wrapper.type = "AmpOptimWrapper"
        wrapper.setdefault("loss_scale", "dynamic")
    elif args.amp is False and wrapper.get("type") == "AmpOptimWrapper":
        wrapper.type = "OptimWrapper"
        for key in ("loss_scale", "dtype", "use_fsdp"):
            wrapper.pop(key, None)
    if wrapper.get("type") == "AmpOptimWrapper" and not torch.cuda.is_available():
        whose = "--amp" if args.amp else f"config {args.config}"
        raise UserError(
            f"{whose}: mmengine's mixed precision needs a GPU, and there is none; --no-amp trains "
            "in float32"
        )


def _test_flags(
    argv: Sequence[str] | None, prog: str, description: str, out: str, what: str
) -> argparse.Namespace:
    parser = Parser(prog=prog, description=description)
    add_common_flags(parser, "checkpoint")
    parser.add_argument("--out", default=None, metavar=out, help=what)
    parser.add_argument(
        "--show-dir", default=None, metavar="FOLDER", help="images with what was found drawn in"
    )
    parser.add_argument("--tta", action="store_true", help="test-time augmentation")
    return parser.parse_args(argv)


def _test(
    args: argparse.Namespace,
    framework: str,
    lay_over: Callable[[Config, argparse.Namespace], None],
) -> None:
    require("mmcv.ops", framework)
    config = read_config(args, framework)
    for key in ("test_dataloader", "test_cfg", "test_evaluator"):
        if not config.get(key):
            raise UserError(f"config {args.config} has no {key}: it tests nothing")
    check_exists(args.checkpoint, "give another checkpoint")
    if args.show_dir and "visualization" not in config.get("default_hooks", {}):
        raise UserError(f"--show-dir: {args.config} has no default_hooks.visualization")
    # The checkpoint has all weights: what training started from need not be here.
    config.load_from, config.resume = args.checkpoint, False
    for _, backbone in backbones(config):
        backbone.update(pretrained=False, init_cfg=None)
    lay_over(config, args)
    check_config(config, ("test",))
    check_annotations(config, ("test",), framework)
    with processes(args.launcher):
        build_runner(config, EvaluationRunner).test()


def _detector_options(config: Config, args: argparse.Namespace) -> None:
    if args.show_dir:
        # Absolute, or mmdet puts it under the work folder.
        folder = str(Path(args.show_dir).absolute())
        config.default_hooks.visualization.update(draw=True, test_out_dir=folder)
    if args.tta:
        nms = {"nms": {"type": "nms", "iou_threshold": 0.5}, "max_per_img": 100}
        config.setdefault("tta_model", {"type": "DetTTAModel", "tta_cfg": nms})
        if "tta_pipeline" not in config:
            config.tta_pipeline = _flipped(_innermost(config.test_dataloader.dataset).pipeline)
        _augment(config)
    if args.out:
        metrics = config.test_evaluator
        metrics = list(metrics) if isinstance(metrics, Sequence) else [metrics]
        config.test_evaluator = [*metrics, {"type": "DumpDetResults", "out_file_path": args.out}]


def _segmentor_options(config: Config, args: argparse.Namespace) -> None:
    if args.show_dir:
        config.default_hooks.visualization.update(draw=True)
        config.visualizer.update(save_dir=args.show_dir)
    if args.tta:
        for key in ("tta_model", "tta_pipeline"):
            if key not in config:
                raise UserError(f"--tta: {args.config} has no {key}")
        _augment(config)
    if args.out:
        metrics = config.test_evaluator
        for metric in metrics if isinstance(metrics, Sequence) else [metrics]:
            metric.update(output_dir=args.out)


def _augment(config: Config) -> None:
    config.model = {**config.tta_model, "module": config.model}
    _innermost(config.test_dataloader.dataset).pipeline = config.tta_pipeline


def _innermost(dataset: ConfigDict) -> ConfigDict:
    """The data set inside those that wrap it."""
    while "dataset" in dataset:
        dataset = dataset.dataset
    return dataset


def _flipped(pipeline: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A pipeline that gives each image as it is and flipped, as mmdet's own tool does."""
    *first, last = pipeline
    keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip")
    flips = [{"type": "RandomFlip", "prob": float(flip)} for flip in (True, False)]
    packed = {**last, "meta_keys": (*keys, "flip_direction")}
    return [*first, {"type": "TestTimeAug", "transforms": [flips, [packed]]}]
