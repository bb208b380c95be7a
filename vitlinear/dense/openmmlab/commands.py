"""The commands ``train-detector``, ``test-detector``, ``train-segmentor``, ``test-segmentor``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner

from vitlinear.cli.flags import file_name, from_arguments
from vitlinear.cli.parser import Parser
from vitlinear.errors import UserError
from vitlinear.files import check_new_file

from .annotations import check_annotations_once
from .checks import (
    backbones,
    check_config,
    check_exists,
    name_arguments,
    sections,
    without_start_weights,
)
from .packages import require
from .results import ResultsHook
from .runner import (
    OVERWRITE,
    EvaluationRunner,
    RunArguments,
    add_common_flags,
    build_runner,
    processes,
    read_run_config,
)


@dataclass(frozen=True)
class TrainArguments:
    """Flags of ``train-detector`` and ``train-segmentor``."""

    run: RunArguments
    amp: bool | None
    auto_scale_lr: bool
    resume: str | None


@dataclass(frozen=True)
class TestArguments:
    """Flags of ``test-detector`` and ``test-segmentor``."""

    run: RunArguments
    checkpoint: str
    out: str | None
    show_dir: str | None
    overwrite: bool
    tta: bool


def train_detector(argv: Sequence[str] | None, prog: str = "vitlinear train-detector") -> None:
    """Train a detector of mmdet."""
    _train(_training_arguments(argv, prog, "Train a detector of mmdet."), "mmdet")


def train_segmentor(argv: Sequence[str] | None, prog: str = "vitlinear train-segmentor") -> None:
    """Train a segmentor of mmseg."""
    _train(_training_arguments(argv, prog, "Train a segmentor of mmseg."), "mmseg")


def test_detector(argv: Sequence[str] | None, prog: str = "vitlinear test-detector") -> None:
    """Evaluate a detector of mmdet."""
    what, out = "Evaluate a detector of mmdet.", "FILE.pkl"
    arguments = _test_arguments(
        argv, prog, what, out,
        "predictions, with the annotations, as a pickle: a new file, but for --overwrite",
    )  # fmt: skip
    if arguments.out:
        if not arguments.out.endswith((".pkl", ".pickle")):
            raise UserError(f"--out {arguments.out}: the name has to end with .pkl")
        inputs = (arguments.checkpoint, arguments.run.config.config)
        check_new_file(arguments.out, arguments.overwrite, inputs)
    _test(arguments, "mmdet")


def test_segmentor(argv: Sequence[str] | None, prog: str = "vitlinear test-segmentor") -> None:
    """Evaluate a segmentor of mmseg."""
    what, out = "Evaluate a segmentor of mmseg.", "FOLDER"
    _test(_test_arguments(argv, prog, what, out, "label maps as PNG files"), "mmseg")


def _training_arguments(argv: Sequence[str] | None, prog: str, description: str) -> TrainArguments:
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
        type=file_name,
        nargs="?",
        const="auto",
        default=None,
        metavar="FILE",
        help="go on from a checkpoint; without FILE, from the last one in --work-dir",
    )
    return from_arguments(TrainArguments, parser.parse_args(argv))


def _train(arguments: TrainArguments, framework: str) -> None:
    require("mmcv.ops", framework)
    config, name = read_run_config(arguments.run, framework), arguments.run.config.config
    for key in ("train_dataloader", "train_cfg", "optim_wrapper"):
        if not config.get(key):
            raise UserError(f"config {name} has no {key}: it trains nothing")
    _set_precision(config, arguments.amp, name)
    if arguments.auto_scale_lr:
        if "base_batch_size" not in config.get("auto_scale_lr", {}):
            raise UserError(f"--auto-scale-lr: {name} has no auto_scale_lr.base_batch_size")
        config.auto_scale_lr.enable = True
    if arguments.resume:
        config.resume = True
        config.load_from = None if arguments.resume == "auto" else arguments.resume
    if config.get("load_from"):
        check_exists(config.load_from, "set --resume or load_from")
    check_config(config, ("train", "val"))
    tell = check_annotations_once(config, ("train", "val"), framework)
    for _, backbone in backbones(config):  # the run's config is to be whole without the weights
        name_arguments(backbone)
    with processes(arguments.run.launcher):
        build_runner(config, prepare=lambda runner: tell()).train()


def _set_precision(config: Config, amp: bool | None, name: str) -> None:
    wrapper = config.optim_wrapper
    if amp:
        wrapper.type = "AmpOptimWrapper"
        wrapper.setdefault("loss_scale", "dynamic")
    elif amp is False and wrapper.get("type") == "AmpOptimWrapper":
        wrapper.type = "OptimWrapper"
        for key in ("loss_scale", "dtype", "use_fsdp"):
            wrapper.pop(key, None)
    if wrapper.get("type") == "AmpOptimWrapper" and not torch.cuda.is_available():
        whose = "--amp" if amp else f"config {name}"
        raise UserError(
            f"{whose}: mmengine's mixed precision needs a GPU, and there is none; --no-amp trains "
            "in float32"
        )


def _test_arguments(
    argv: Sequence[str] | None, prog: str, description: str, out: str, what: str
) -> TestArguments:
    parser = Parser(prog=prog, description=description)
    add_common_flags(parser, "checkpoint")
    parser.add_argument("--out", type=file_name, default=None, metavar=out, help=what)
    parser.add_argument(
        "--show-dir",
        type=file_name,
        default=None,
        metavar="FOLDER",
        help="images with what was found drawn in",
    )
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    parser.add_argument(
        "--tta",
        action="store_true",
        help="test-time augmentation; of a detector's boxes, not masks",
    )
    return from_arguments(TestArguments, parser.parse_args(argv))


def _test(arguments: TestArguments, framework: str) -> None:
    require("mmcv.ops", framework)
    config, name = read_run_config(arguments.run, framework), arguments.run.config.config
    for key in ("test_dataloader", "test_cfg", "test_evaluator"):
        if not config.get(key):
            raise UserError(f"config {name} has no {key}: it tests nothing")
    check_exists(arguments.checkpoint, "give another checkpoint")
    if arguments.show_dir and "visualizer" not in config:
        raise UserError(f"--show-dir: {name} has no visualizer, which draws")
    # The checkpoint has all weights: what training started from need not be here.
    config.load_from, config.resume = arguments.checkpoint, False
    for _, backbone in backbones(config):
        without_start_weights(backbone)
    lay_over = _detector_options if framework == "mmdet" else _segmentor_options
    lay_over(config, arguments)
    check_config(config, ("test",))
    tell = check_annotations_once(config, ("test",), framework)
    results = _results(config, arguments, framework)

    def prepare(runner: Runner) -> None:
        tell()
        if results is not None:
            results.attach(runner)

    with processes(arguments.run.launcher):
        build_runner(config, EvaluationRunner, prepare).test()


def _results(config: Config, arguments: TestArguments, framework: str) -> ResultsHook | None:
    """The hook that writes drawings and label maps, if any are asked for."""
    label_maps, settings = None, {}
    if framework == "mmseg":
        label_maps = arguments.out
    else:
        hook = config.get("default_hooks", {}).get("visualization", {})
        settings["pred_score_thr"] = hook.get("score_thr", 0.3)
    if not (arguments.show_dir or label_maps):
        return None
    return ResultsHook(arguments.show_dir, label_maps, arguments.overwrite, settings)


def _detector_options(config: Config, arguments: TestArguments) -> None:
    if arguments.tta:
        _refuse_masks(config, arguments.run.config.config)
        nms = {"nms": {"type": "nms", "iou_threshold": 0.5}, "max_per_img": 100}
        config.setdefault("tta_model", {"type": "DetTTAModel", "tta_cfg": nms})
        if "tta_pipeline" not in config:
            config.tta_pipeline = _flipped(_innermost(config.test_dataloader.dataset).pipeline)
        _augment(config)
    if arguments.out:
        metrics = config.test_evaluator
        metrics = list(metrics) if isinstance(metrics, Sequence) else [metrics]
        dump = {"type": "DumpDetResults", "out_file_path": arguments.out}
        config.test_evaluator = [*metrics, dump]


def _refuse_masks(config: Config, name: str) -> None:
    """Refuse test-time augmentation of masks, which mmdet's merging of boxes has no way for."""
    heads = (key.rpartition(".")[2] for key, _ in sections(config.model, "model"))
    metrics = (part.get("metric") or () for _, part in sections(config.test_evaluator, ""))
    if "mask_head" in heads or any("segm" in metric for metric in metrics):
        raise UserError(
            f"--tta: it is for boxes alone, and {name} has masks; leave --tta out, or take a "
            "config without them"
        )


def _segmentor_options(config: Config, arguments: TestArguments) -> None:
    if arguments.tta:
        for key in ("tta_model", "tta_pipeline"):
            if key not in config:
                raise UserError(f"--tta: {arguments.run.config.config} has no {key}")
        _augment(config)


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
