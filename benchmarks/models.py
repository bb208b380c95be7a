"""Speed and memory of any timm models, side by side: `python tools/benchmark_models.py --help`.

Each model in each mode has a process of its own (`subject`), and all of one pass, size and batch
take turns, round by round (`vitlinear.benchmark.turns`). The ratio to the reference is the median
of the ratios of single rounds.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

import vitlinear
from benchmarks.attention import KEEP_PAGES, commit, machine
from benchmarks.models_report import plot, print_report
from benchmarks.subject import MODES, PASSES, PRECISIONS, Case, check_subject, serve
from benchmarks.transcription import SUFFIX
from vitlinear.benchmark.programs import parse_sides
from vitlinear.benchmark.turns import measure
from vitlinear.cli.device import choose_device
from vitlinear.cli.flags import path
from vitlinear.cli.parser import Parser
from vitlinear.errors import UserError, did_you_mean
from vitlinear.files import check_results, write_text
from vitlinear.train.record.curves import check_plotting


def parser(prog: str) -> Parser:
    """The flags."""
    flags = Parser(prog=prog, description="Speed and memory of any timm models, side by side.")
    flags.add_argument("models", nargs="*", metavar="MODEL",
                       help=f"timm's or ours; ravlt_s@library, ravlt_s{SUFFIX}")  # fmt: skip
    flags.add_argument("--sizes", nargs="+", default=["224"], metavar="SIZE", help="224 or 480x640")
    flags.add_argument("-b", "--batch-sizes", nargs="+", type=int, default=[8], metavar="N")
    flags.add_argument("--modes", nargs="+", default=["eager"], metavar="MODE",
                       help=", ".join(MODES))  # fmt: skip
    flags.add_argument("--passes", nargs="+", choices=PASSES, default=["forward"],
                       help="forward is inference; train is a whole step with AdamW")  # fmt: skip
    flags.add_argument("--reference", metavar="MODEL", help="ratios are to it (default: the first)")
    flags.add_argument("--device", help="default: cuda where there is one")
    flags.add_argument("--precision", choices=PRECISIONS, default="float32")
    flags.add_argument("--channels-last", action="store_true")
    flags.add_argument("--threads", type=int, default=torch.get_num_threads())
    flags.add_argument("--rounds", type=int, default=10)
    flags.add_argument("--seconds", type=float, default=0.5, help="of a model in a round")
    flags.add_argument("--timeout", type=float, default=600, help="seconds to prepare or answer in")
    flags.add_argument("--malloc", choices=("keep", "default"), default="keep",
                       help="on CPUs keep freed pages, as a caching allocator would")  # fmt: skip
    flags.add_argument("--output", type=path, metavar="FILE.json")
    flags.add_argument("--plot", type=path, metavar="FILE.png", help="against the resolution")
    flags.add_argument("--report", type=path, metavar="FILE.json",
                       help="measure nothing: table and plot of an earlier --output")  # fmt: skip
    return flags


def checked(args: Any) -> list[list[Case]]:
    """The cases that flags ask for; those of a list take turns.

    Raises:
        UserError: An unknown model, mode, size or device, or numbers that make no sense.
    """
    if not args.models:
        raise UserError("no model: name one or several, e.g. ravlt_t swin_tiny_patch4_window7_224")
    args.reference = args.reference or args.models[0]
    for name in args.models:
        check_subject(name)
    if args.reference not in args.models:
        hint = did_you_mean(args.reference, args.models)
        raise UserError(f"--reference {args.reference} is not among the models{hint}")
    for mode in args.modes:
        if mode not in MODES:
            hint = did_you_mean(mode, MODES) or f"; there are {', '.join(MODES)}"
            raise UserError(f"unknown mode '{mode}'{hint}")
    for name in ("rounds", "seconds", "timeout", "threads"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name} must be more than 0")
    if min(args.batch_sizes) < 1:
        raise UserError("--batch-sizes must be at least 1")
    device = str(choose_device(args.device))
    sizes = [parse_sides(text) for text in args.sizes]
    groups = []
    for task, (height, width), batch in itertools.product(args.passes, sizes, args.batch_sizes):
        modes = [mode for mode in args.modes if task == "forward" or MODES[mode]]
        if not modes:
            raise UserError(f"no training step in {' or '.join(args.modes)}: add --modes eager")
        options = (device, args.precision, args.channels_last, args.threads)
        groups.append(
            [
                Case(model, mode, task, height, width, batch, *options)
                for mode in dict.fromkeys(modes)
                for model in dict.fromkeys(args.models)
            ]
        )
    return groups


def described(args: Any, argv: Sequence[str], device: str) -> dict[str, Any]:
    """The head of a result file: command, machine, versions, reference."""
    where = f"{machine()}; {args.threads} threads used"
    if device.startswith("cuda"):
        where = f"{torch.cuda.get_device_name(device)}; {where}"
    return {
        "command": shlex.join(["python", "tools/benchmark_models.py", *argv]),
        "machine": where,
        "load": os.getloadavg()[0],
        "commit": commit(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "vitlinear": vitlinear.__version__,
        "malloc": args.malloc,
        "reference": args.reference,
    }


def read(file: Path) -> dict[str, Any]:
    """A file that ``--output`` wrote."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        record["rows"][0]["model"], record["reference"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"--report {file} is no result of this tool: {error}") from error
    return record


def main(argv: Sequence[str] | None = None, prog: str = "benchmark_models.py") -> None:
    """Measures, prints a table, writes a file and a plot."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser(prog).parse_args(argv)
    if args.plot:
        check_plotting("--plot", instead="")
    check_results({"--output": args.output, "--plot": args.plot}, [args.report])
    if args.report:
        record = read(args.report)
    else:
        groups = checked(args)
        if args.malloc == "keep":
            os.environ.update(KEEP_PAGES)  # glibc reads them when the subjects' server starts
        record = {**described(args, argv, groups[0][0].device), "rows": []}
        for i, cases in enumerate(groups, 1):
            case = cases[0]
            what = f"{case.task} at {case.height} x {case.width}, batch {case.batch}"
            print(f"[{i}/{len(groups)}] {what}: {len(cases)} rows", file=sys.stderr, flush=True)
            record["rows"] += measure(serve, cases, args.rounds, args.seconds, args.timeout)
            if args.output:  # whatever ends this early, what was measured is there
                write_text(args.output, json.dumps(record, indent=1) + "\n")
    print_report(record)
    if all("error" in row for row in record["rows"]):
        raise UserError("nothing could be measured; the table says why")
    if args.plot:
        plot(record, args.plot)
