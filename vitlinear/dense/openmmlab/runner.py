"""Training and testing with mmengine's Runner: what the four commands have in common."""

from __future__ import annotations

import argparse
import contextlib
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch import distributed, nn

from vitlinear.checkpoints.read import CheckpointError, read_checkpoint
from vitlinear.checkpoints.translate import layout_of
from vitlinear.cli.configs import find_config
from vitlinear.cli.flags import file_name
from vitlinear.cli.parser import Parser
from vitlinear.errors import Notice, UserError, one_line
from vitlinear.processes import join_processes, process_group

from .checks import sections
from .reading import safe_reading

TASKS = {"mmdet": "detection", "mmseg": "segmentation"}
OVERWRITE = "replace results of an earlier run, where a number behind the name keeps them apart"
SYNC_BN = ("SyncBN", "MMSyncBN")
TIMEOUT = 1800  # seconds that processes on CPUs wait for each other


@dataclass(frozen=True)
class ConfigArguments:
    """A config, and settings laid over it."""

    config: str
    cfg_options: tuple[str, ...]


def add_config_flags(parser: Parser, *files: str) -> None:
    """The flags of `ConfigArguments`, and other files."""
    parser.add_argument(
        "config", type=file_name, help="a config file of mmengine's, or the name of one of ours"
    )
    for name in files:
        parser.add_argument(name, type=file_name)
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings laid over the config: train_cfg.max_epochs=3 randomness.seed=0 ...",
    )


@dataclass(frozen=True)
class RunArguments:
    """Common to training and testing: the config, the folder of the run, its processes."""

    config: ConfigArguments
    work_dir: str | None
    launcher: str


def add_common_flags(parser: Parser, *files: str) -> None:
    """The flags of `RunArguments`, and other files."""
    add_config_flags(parser, *files)
    parser.add_argument(
        "--work-dir",
        type=file_name,
        default=None,
        metavar="FOLDER",
        help="default: work_dirs/NAME-OF-THE-CONFIG",
    )
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="what starts several processes; pytorch is torchrun",
    )


def read_config(arguments: ConfigArguments, framework: str) -> tuple[Config, Path]:
    """Returns the config with the settings laid over it, and where it is.

    Args:
        arguments: The config by its path or name, and the settings.
        framework: ``mmdet`` or ``mmseg``, which says where a name without a path is looked for.

    Raises:
        UserError: It is missing or broken, as one that it inherits may be, or an option is.
    """
    path = find_config(arguments.config, TASKS[framework])
    if not path.is_file():
        raise UserError(f"config {arguments.config} does not exist")
    try:
        with safe_reading():
            config = Config.fromfile(path)
        config.merge_from_dict(_options(arguments.cfg_options))
    except UserError:
        raise
    except Exception as error:  # a config is a program
        raise UserError(f"config {arguments.config} cannot be read: {one_line(error)}") from error
    return config, path


def read_run_config(arguments: RunArguments, framework: str) -> Config:
    """As `read_config`, with the folder of the run and its launcher."""
    config, path = read_config(arguments.config, framework)
    config.launcher = arguments.launcher
    if arguments.work_dir is not None:
        config.work_dir = arguments.work_dir
    elif config.get("work_dir") is None:
        config.work_dir = str(Path("work_dirs", path.stem))
    return config


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    for pair in pairs:
        if not pair.partition("=")[0] or "=" not in pair:
            raise UserError(f"--cfg-options: expected KEY=VALUE, got {pair!r}")
    options = argparse.Namespace()
    DictAction([], "of_config", nargs="+")(argparse.ArgumentParser(), options, list(pairs))
    return options.of_config


class EvaluationRunner(Runner):
    """mmengine's Runner, which lets no weight stay as it was drawn and runs no code of a file."""

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """Load all weights of the model.

        Raises:
            CheckpointError: The file is damaged or is not this model's, or numbers the classes in
                another way than the data.
        """
        content = read_checkpoint(filename)
        trained = dataset_meta(content).get("classes")
        if isinstance(trained, list | tuple):
            tested = getattr(self.test_loop.dataloader.dataset, "metainfo", {}).get("classes")
            _compare_classes(filename, list(trained), list(tested or trained))
        checkpoint = dict(content) if "state_dict" in content else {"state_dict": content}
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        model = self.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        load_weights(model, checkpoint["state_dict"], filename)
        return checkpoint


def dataset_meta(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns what a checkpoint says of its data: classes and palette; empty if it says nothing."""
    meta = checkpoint.get("meta")
    found = meta.get("dataset_meta") if isinstance(meta, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _compare_classes(filename: str, trained: list[str], tested: list[str]) -> None:
    """Refuse classes of one name under two numbers, and tell of other names."""
    moved = [
        name for name in trained if name in tested and tested.index(name) != trained.index(name)
    ]
    if moved:
        numbers = f"{trained.index(moved[0])}, in the data {tested.index(moved[0])}"
        raise CheckpointError(
            f"checkpoint {filename} was trained with other numbers of the classes: {moved[0]!r} is "
            f"{numbers}; give metainfo.classes the order of training, which is {trained}"[:600]
        )
    renamed = [pair for pair in zip(trained, tested, strict=False) if pair[0] != pair[1]]
    if renamed:
        print(
            f"checkpoint {filename} calls {len(renamed)} classes by other names than the data: "
            f"{renamed[0][0]!r} where the data has {renamed[0][1]!r}"
        )


def load_weights(model: nn.Module, weights: Mapping[str, Any], filename: str) -> None:
    """Load all weights of a model.

    Raises:
        CheckpointError: Some are missing, or there are others.
    """
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        authors = isinstance(weights, Mapping) and layout_of(weights) is not None
        hint = "convert it first, with `vitlinear convert`; " if authors else ""
        raise CheckpointError(
            f"checkpoint {filename} is not of this config's model: {hint}{one_line(error)[:300]}"
        ) from error


def build_runner(
    config: Config, kind: type[Runner] = Runner, prepare: Callable[[Runner], object] | None = None
) -> Runner:
    """The runner of a config, of a kind of its own if it names one.

    Args:
        config: The whole.
        kind: Of the runner, unless the config says.
        prepare: Is given the runner; if it refuses, the folder of the run goes again.
    """
    if config.launcher != "none" and not torch.cuda.is_available():
        _without_sync_bn(config)
        # mmengine would name a GPU for each process.
        config.setdefault(
            "model_wrapper_cfg",
            {
                "type": "MMDistributedDataParallel",
                "device_ids": None,
                "broadcast_buffers": False,
                "find_unused_parameters": config.get("find_unused_parameters", False),
            },
        )
    work_dir = Path(config.work_dir)
    is_new = not work_dir.exists()
    _forget_visualizer(config)
    try:
        runner = RUNNERS.build(config) if "runner_type" in config else kind.from_cfg(config)
        if prepare is not None:
            prepare(runner)
        return runner
    except BaseException:
        if is_new:  # mmengine makes it before it builds the model
            shutil.rmtree(work_dir, ignore_errors=True)
        raise


def _forget_visualizer(config: Config) -> None:
    """Have mmengine make the visualizer of a run anew.

    By the name in the config it would return that of a run before in this process, which writes
    curves and pictures into the folder of that run.
    """
    name = (config.get("visualizer") or {}).get("name")
    kinds: list[Any] = [Visualizer]
    while kinds:
        kind = kinds.pop()
        kind._instance_dict.pop(name, None)
        kinds += kind.__subclasses__()


def _without_sync_bn(config: Config) -> None:
    """Make batch norms those of each process, with a `Notice`: SyncBN runs on GPUs alone."""
    shared = [part for _, part in sections(config.model, "model") if part.get("type") in SYNC_BN]
    if config.get("sync_bn") is None and not shared:
        return
    config.sync_bn = None
    for part in shared:
        part["type"] = "BN"
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        warnings.warn(
            "without a GPU, batch norms take the statistics of each process alone: SyncBN is BN",
            Notice,
            stacklevel=2,
        )


@contextlib.contextmanager
def processes(launcher: str) -> Iterator[None]:
    """Joins the other processes, where mmengine would ask for a GPU, and tells mistakes apart.

    Nothing of the files that are read inside is run; see `safe_reading`.

    Raises:
        UserError: The others cannot be reached; a file that the config names is missing, or what
            it names is in no registry.
    """
    with process_group():
        if launcher != "none" and not torch.cuda.is_available():
            join_processes(torch.device("cpu"), TIMEOUT)
            if not distributed.is_initialized():
                raise UserError(f"--launcher {launcher}: this process was not started by it")
        try:
            with safe_reading():
                yield
        except pickle.UnpicklingError as error:  # of a reader that is not mmengine's
            raise CheckpointError(
                f"a file that the config names is refused: {one_line(error)[:200]}"
            ) from error
        except FileNotFoundError as error:
            raise UserError(f"{error.filename or one_line(error)} does not exist") from error
        except KeyError as error:
            if "registry" not in str(error):
                raise
            raise UserError(f"the config names something unknown: {one_line(error)}") from error
