"""The ``train`` command: a run from its flags to its last line.

Files of a run. At each start: ``args.yaml``, which is a ``--config``; ``environment.json`` and,
where the code differs from its commit, ``git.patch``. Every log interval: ``updates.jsonl``. At the
end of each epoch: ``best.safetensors`` (the best held-out metric so far, of the model or of its
moving average), ``last.safetensors`` (the average where there is one), ``last_state.pt`` (what
resuming needs), ``summary.csv`` and ``metrics.jsonl`` (a row per epoch), ``curves.png``,
``bad_images.txt`` (if any were skipped). Trackers have a folder each.
"""

import sys
from collections.abc import Sequence
from typing import Any

import yaml

from vitlinear.cli.config_file import parse_with_config, printed, saved_arguments
from vitlinear.cli.flags import from_arguments
from vitlinear.cli.parser import Parser
from vitlinear.errors import UserError
from vitlinear.files import write_text
from vitlinear.processes import process_group
from vitlinear.signals import Stopped, StopSignals

from .config import TrainConfig, add_train_flags
from .epochs import run_epochs
from .record.curves import check_plotting
from .record.environment import record_start
from .record.folder import ARGUMENTS, BEST, RunFolder
from .record.logger import FileLogger, Loggers
from .record.trackers import check_trackers, make_trackers
from .recorder import Recorder
from .resume import (
    Start,
    check_same_place,
    check_same_run,
    find_state,
    restore,
    resume_note,
)
from .setup import set_up


def make_parser(prog: str) -> Parser:
    """Returns a parser that knows every flag of training."""
    parser = Parser(prog=prog, description="Train a classifier; weights, metrics and curves.")
    add_train_flags(parser)
    return parser


def parse_arguments(argv: Sequence[str] | None, prog: str = "vitlinear train") -> TrainConfig:
    """Parses flags over the ``--config`` file."""
    return from_arguments(TrainConfig, parse_with_config(make_parser(prog), argv))


def main(argv: Sequence[str] | None, prog: str = "vitlinear train") -> None:
    """Runs the command; a run that a signal stopped ends the process with that signal's status."""
    config = parse_arguments(argv, prog)
    if config.print_config:
        print(printed(config), end="")
        return
    try:
        train(config)
    except Stopped as stop:
        if stop.folder is not None:
            print(stop, flush=True)
        sys.exit(stop.exit_status)


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains a classifier.

    Args:
        config: From `parse_arguments`.

    Returns:
        ``folder``, ``epoch`` (number done), ``best`` (metric, value, epoch, weights).

    Raises:
        UserError: The request or the data cannot work; no file is left behind unless the run had
            a row or a state to show.
        Stopped: A signal asked for it; the state is written.
    """
    resume, overwrite, record = config.folder.resume, config.folder.overwrite, config.record
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if record.plot:
        check_plotting()
    check_trackers(record.log_tensorboard, record.log_wandb)
    path, state, note = find_state(config.folder, config.model.model or "")
    saved = saved_arguments(config)
    if state is not None:
        check_same_run(saved, state, path)
    files = RunFolder(path, resume=bool(resume), overwrite=overwrite)
    files.check()
    with process_group():
        run = set_up(config, resumes=state is not None)
        if resume:
            check_same_place(run.processes, state)
        start = Start() if state is None else restore(run, state)
        if state is not None:
            run.notes.append(resume_note(run, start, saved, state["args"]))
            state = None  # or its tensors would be kept to the end
        with StopSignals() as signals:
            if run.processes.rank != 0:
                return run_epochs(run, Recorder(run, saved), start, signals)
            with files:
                write_text(path / ARGUMENTS, yaml.safe_dump(saved, sort_keys=False))
                record_start(path, run.device, run.updater.updates)
                for line in (*filter(None, [note]), *run.notes, f"files go to {path}"):
                    print(line)
                with Loggers(FileLogger(path), make_trackers(record, path, saved)) as log:
                    log.keep_before(start.epoch, run.updater.updates)
                    result = run_epochs(run, Recorder(run, saved, path, log), start, signals)
                print(_end_note(result))
                return result


def _end_note(result: dict[str, Any]) -> str:
    best = result["best"]
    return (
        f"ended after epoch {result['epoch']}; best held-out {best['metric']} "
        f"{best['value']:.4g} (epoch {best['epoch']}), in {result['folder'] / BEST}"
    )
