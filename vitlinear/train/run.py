"""The ``train`` command.

Files of a run. At each start: ``args.yaml``, which is a ``--config``; ``environment.json`` and,
where the code differs from its commit, ``git.patch``. Every log interval: ``updates.jsonl``. At the
end of each epoch: ``best.safetensors`` (the best held-out metric so far, of the model or of its
moving average), ``last.safetensors`` (the average where there is one), ``last_state.pt`` (what
resuming needs), ``summary.csv`` and ``metrics.jsonl`` (a row per epoch), ``curves.png``,
``bad_images.txt`` (if any were skipped). Trackers have a folder each.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from vitlinear.cli import flags as arguments
from vitlinear.cli.config_file import parse_with_config, saved_arguments
from vitlinear.cli.parser import Parser
from vitlinear.errors import UserError
from vitlinear.files import write_text
from vitlinear.processes import process_group
from vitlinear.signals import Stopped, StopSignals

from .epochs import run_epochs
from .flags import add_training_arguments
from .record import folder
from .record.curves import check_plotting
from .record.environment import record_start
from .record.logger import FileLogger, Loggers
from .record.trackers import check_trackers, make_trackers
from .resume import Start, check_same_run, find_state, restore, resume_note
from .setup import set_up


def make_parser(prog: str) -> Parser:
    """Returns a parser that knows every flag of training."""
    parser = Parser(prog=prog, description="Train a classifier; weights, metrics and curves.")
    arguments.add_data_arguments(parser)
    arguments.add_bad_images_argument(parser)
    arguments.add_model_arguments(parser, default="ravlt_t")
    arguments.add_input_arguments(parser)
    add_training_arguments(parser)
    arguments.add_device_arguments(parser)
    return parser


def parse_arguments(
    argv: Sequence[str] | None, prog: str = "vitlinear train"
) -> argparse.Namespace:
    """Parses flags over the ``--config`` file."""
    return parse_with_config(make_parser(prog), argv)


def main(argv: Sequence[str] | None, prog: str = "vitlinear train") -> None:
    """Runs the command; a run that a signal stopped ends the process with that signal's status."""
    args = parse_arguments(argv, prog)
    if args.print_config:
        print(yaml.safe_dump(saved_arguments(args), sort_keys=False), end="")
        return
    try:
        train(args)
    except Stopped as stop:
        if args.rank == 0:
            print(stop, flush=True)
        sys.exit(stop.exit_status)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Trains as ``args`` say.

    Args:
        args: From `parse_arguments`.

    Returns:
        ``folder``, ``epoch`` (number done), ``best`` (metric, value, epoch, weights).

    Raises:
        UserError: The request or the data cannot work; no file is left behind unless the run had
            a row or a state to show.
    """
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if args.plot:
        check_plotting()
    check_trackers(args.log_tensorboard, args.log_wandb)
    path, state, note = find_state(args)
    saved = saved_arguments(args)  # before the launcher's ranks are added
    if state is not None:
        check_same_run(saved, state, path)
    files = folder.RunFolder(path, resume=bool(args.resume), overwrite=args.overwrite)
    files.check()
    with process_group():
        run = set_up(args)
        start = Start() if state is None else restore(run, state)
        if state is not None:
            run.notes.append(resume_note(run, start, saved, state["args"]))
        with StopSignals() as signals:
            if args.rank != 0:
                return run_epochs(run, None, start, saved, signals)
            with files:
                write_text(path / folder.ARGUMENTS, yaml.safe_dump(saved, sort_keys=False))
                record_start(path, run.device, run.updater.updates)
                for line in (*filter(None, [note]), *run.notes, f"files go to {path}"):
                    print(line)
                with Loggers(FileLogger(path), make_trackers(args, path, saved)) as log:
                    log.keep_before(start.epoch, run.updater.updates)
                    result = run_epochs(run, path, start, saved, signals, log)
                print(_end_note(result))
                return result


def _end_note(result: dict[str, Any]) -> str:
    best = result["best"]
    return (
        f"ended after epoch {result['epoch']}; best held-out {best['metric']} "
        f"{best['value']:.4g} (epoch {best['epoch']}), in {result['folder'] / folder.BEST}"
    )
