"""The ``vitlinear`` command.

A sub-command is one line of `COMMANDS`: a module, imported only when asked for, that has
``main(argv, prog)``, or another function where one is named. It parses its own flags, and raises
`UserError` for a user's mistake.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence

import vitlinear
from vitlinear.errors import LostPeerError, UserError

OPENMMLAB = "vitlinear.dense.openmmlab.commands"
COMMANDS = {
    "train": ("vitlinear.train.run", "train a classifier"),
    "validate": ("vitlinear.train.validate", "accuracy and loss of a checkpoint or model"),
    "predict": ("vitlinear.predict", "classes of image files; boxes, masks, label maps"),
    "compare-runs": ("vitlinear.train.compare", "several training runs: curves and a table"),
    "check-data": ("vitlinear.train.check_data", "unreadable and odd images, classes, sizes"),
    "list": ("vitlinear.cards.list_models", "the models, one a line"),
    "info": ("vitlinear.cards.info", "what is known of a model"),
    "convert": ("vitlinear.checkpoints.convert", "the authors' checkpoints to ours"),
    "export": ("vitlinear.export.command", "a model as ONNX, torch.export or safetensors"),
    "train-detector": (f"{OPENMMLAB}:train_detector", "a detector of mmdet"),
    "test-detector": (f"{OPENMMLAB}:test_detector", "its average precision"),
    "train-segmentor": (f"{OPENMMLAB}:train_segmentor", "a segmentor of mmseg"),
    "test-segmentor": (f"{OPENMMLAB}:test_segmentor", "its intersection over union"),
}

# Where torchrun lets each process leave the reason of its failure.
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


def _usage() -> str:
    lines = [f"  {name:<16}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        (
            "usage: vitlinear [--help] [--version] COMMAND ...",
            "",
            "Linear-attention vision backbones for timm.",
            "",
            "commands:",
            *lines,
            "",
            "`vitlinear COMMAND --help` lists a command's options.",
        )
    )


def _dispatch(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return
    if argv[0] == "--version":
        print(f"vitlinear {vitlinear.__version__}")
        return
    name = argv[0]
    if name not in COMMANDS:
        from vitlinear.train.config import did_you_mean

        kind = "option" if name.startswith("-") else "command"
        raise UserError(
            f"unknown {kind} '{name}'{did_you_mean(name, COMMANDS)}; `vitlinear --help` lists them"
        )
    module, _, function = COMMANDS[name][0].partition(":")
    command = getattr(importlib.import_module(module), function or "main")
    command(argv[1:], prog=f"vitlinear {name}")


def _message(error: UserError) -> str:
    """Returns one line; a data worker's error arrives wrapped in that process's traceback."""
    text = str(error).rstrip().rsplit(f"{UserError.__module__}.{UserError.__name__}: ", 1)[-1]
    return " ".join(text.split())


def _report(error: UserError) -> None:
    """Shows an error once: under torchrun in its summary, which names the process, else here."""
    text = f"error: {_message(error)}"
    path = os.environ.get(ERROR_FILE)
    if not path:
        print(text, file=sys.stderr)
        return
    # The summary takes the earliest for the cause, and counts in seconds.
    when = int(time.time()) + isinstance(error, LostPeerError)
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"message": text, "timestamp": when}, file)


def run(command: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Runs a command and turns what a user can do something about into one line.

    Args:
        command: Takes the arguments.
        argv: Arguments without the program's name; by default the process's own.

    Returns:
        Exit status: 0, or 2 for a user's mistake, or 130 when interrupted.
    """
    if os.environ.get(ERROR_FILE):
        from torch.distributed.elastic.multiprocessing.errors import record

        command = record(command)
    try:
        command(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        _report(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the ``vitlinear`` command line; arguments and exit status are those of `run`."""
    return run(_dispatch, argv)


if __name__ == "__main__":
    sys.exit(main())
