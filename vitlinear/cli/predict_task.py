"""The ``predict`` command: ``--task`` decides which module runs it."""

import importlib
from collections.abc import Sequence

from .parser import Parser

OPENMMLAB = "vitlinear.dense.openmmlab.detect_segment"
TASKS = {
    "classification": ("vitlinear.evaluation.predict", "main"),
    "detection": (OPENMMLAB, "detect"),
    "segmentation": (OPENMMLAB, "segment"),
}


def main(argv: Sequence[str], prog: str = "vitlinear predict") -> None:
    """Hands the other arguments to the task, classification where none is named."""
    parser = Parser(prog=prog, add_help=False)
    parser.add_argument("--task", choices=TASKS, default=None)
    known, rest = parser.parse_known_args(argv)
    module, function = TASKS[known.task or "classification"]
    prog = f"{prog} --task {known.task}" if known.task else prog
    getattr(importlib.import_module(module), function)(rest, prog=prog)
