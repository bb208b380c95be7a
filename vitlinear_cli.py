"""The ``vitlinear`` command, outside the package: help and version answer before torch is loaded.

A sub-command is one line of `COMMANDS`: a module, imported only when asked for, that has
``main(argv, prog)``, or another function where one is named. It parses its own flags, and raises
`vitlinear.errors.UserError` for a user's mistake.
"""

import contextlib
import importlib
import importlib.metadata
import json
import os
import select
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

OPENMMLAB = "vitlinear.dense.openmmlab.commands"
COMMANDS = {
    "train": ("vitlinear.train.run", "train a classifier"),
    "validate": ("vitlinear.evaluation.validate", "accuracy and loss of a checkpoint or model"),
    "predict": ("vitlinear.cli.predict_task", "classes of image files; boxes, masks, label maps"),
    "stream": ("vitlinear.evaluation.stream_image", "a model on an image larger than memory"),
    "compare-runs": ("vitlinear.train.compare_runs", "several training runs: curves and a table"),
    "check-data": ("vitlinear.data.check_data", "unreadable and odd images, classes, sizes"),
    "list": ("vitlinear.cards.list_models", "the models, one a line"),
    "attentions": ("vitlinear.cards.attentions", "the attentions by name, and what they compute"),
    "info": ("vitlinear.cards.info", "what is known of a model"),
    "configs": ("vitlinear.cli.configs", "the recipes and configs that come with it"),
    "convert": ("vitlinear.convert.command", "the authors' checkpoints to ours"),
    "tune": ("vitlinear.tune.command", "check and time the GPU kernels, keep what is faster"),
    "doctor": ("vitlinear.tune.doctor", "versions, devices, and what `auto` would do here"),
    "push": (
        "vitlinear.cards.push",
        "a trained model to the Hugging Face hub, or a folder of its form",
    ),
    "export": ("vitlinear.export.command", "a model as ONNX, torch.export or safetensors"),
    "benchmark": ("vitlinear.benchmark.command", "speed in PyTorch, onnxruntime and OpenVINO"),
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


def _version() -> str:
    """The version as installed; from the package itself in a checkout that is not."""
    try:
        return importlib.metadata.version("vitlinear")
    except importlib.metadata.PackageNotFoundError:
        import vitlinear

        return vitlinear.__version__


def _dispatch(argv: Sequence[str]) -> None:
    from vitlinear.errors import UserError, did_you_mean

    name = argv[0]
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        raise UserError(
            f"unknown {kind} '{name}'{did_you_mean(name, COMMANDS)}; `vitlinear --help` lists them"
        )
    module, _, function = COMMANDS[name][0].partition(":")
    command = getattr(importlib.import_module(module), function or "main")
    command(argv[1:], prog=f"vitlinear {name}")


def _message(error: Exception) -> str:
    """One line; a data worker's error arrives wrapped in that process's traceback."""
    from vitlinear.errors import UserError

    text = str(error).rstrip().rsplit(f"{UserError.__module__}.{UserError.__name__}: ", 1)[-1]
    return " ".join(text.split())


def _report(error: Exception) -> None:
    """Shows an error once: under torchrun in its summary, which names the process, else here."""
    from vitlinear.errors import LostPeerError

    text = f"error: {_message(error)}"
    path = os.environ.get(ERROR_FILE)
    if not path:
        print(text, file=sys.stderr)
        return
    # The summary takes the earliest for the cause, and counts in seconds.
    when = int(time.time()) + isinstance(error, LostPeerError)
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"message": text, "timestamp": when}, file)


@contextlib.contextmanager
def _plain_notices() -> Iterator[None]:
    """Prints each `Notice` as a line, without the place in the code that other warnings name."""
    from vitlinear.errors import Notice

    other = warnings.formatwarning

    def one_line(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if issubclass(category, Notice):
            return f"note: {message}\n"
        return other(message, category, filename, lineno, line)

    warnings.formatwarning = one_line
    try:
        yield
    finally:
        warnings.formatwarning = other


def _nobody_reads() -> bool:
    """Whether the reader of standard output, such as `head`, has gone."""
    if not hasattr(select, "poll"):  # Windows, where this error has no pipe's meaning
        return False
    output = select.poll()
    output.register(sys.stdout.fileno(), select.POLLERR)
    return bool(output.poll(0))


def run(command: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Runs a command and turns what a user can do something about into one line.

    Args:
        command: Takes the arguments.
        argv: Arguments without the program's name; by default the process's own.

    Returns:
        Exit status: 0, or 2 for a user's mistake or where standard output cannot be written, 130
        when interrupted, or 141, as of SIGPIPE, when nobody reads on.
    """

    def work() -> int:
        from vitlinear.errors import UserError

        run_it = command
        if os.environ.get(ERROR_FILE):
            from torch.distributed.elastic.multiprocessing.errors import record

            run_it = record(command)
        try:
            with _plain_notices():
                run_it(sys.argv[1:] if argv is None else argv)
        except UserError as error:
            _report(error)
            return 2
        return 0

    return _guarded(work)


def _guarded(work: Callable[[], int]) -> int:
    """Returns the exit status of ``work``, or of its end by Ctrl-C or by standard output."""
    # Closed: the next file that is opened would get its number, and with it what C prints.
    if sys.stdout is None:
        print("error: standard output is closed: open it, or send it to /dev/null", file=sys.stderr)
        return 2
    try:
        try:
            status = work()
        except SystemExit:  # as after --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _nobody_reads():  # another pipe: to a data worker, say
            raise
        _leave_output()
        return 141
    except OSError as error:
        if not _output_fails():  # another file
            raise
        reason = error.strerror or error
        print(f"error: cannot write to standard output: {reason}", file=sys.stderr)
        _leave_output()
        return 2


def _output_fails() -> bool:
    """Whether standard output does not take a line more, after an error that may be another's."""
    try:
        print(flush=True)  # a line of its own: with PYTHONUNBUFFERED nothing is left to be flushed
    except OSError:
        return True
    return False


def _leave_output() -> None:
    """Lets what is left of standard output go nowhere: Python flushes once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the ``vitlinear`` command line; arguments and exit status are those of `run`."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        return _guarded(lambda: _answer(_usage()))
    if argv[0] == "--version":
        return _guarded(lambda: _answer(f"vitlinear {_version()}"))
    return run(_dispatch, argv)


def _answer(text: str) -> int:
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
