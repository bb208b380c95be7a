"""The ``benchmark`` command: models in the runtimes of CPUs, timed in turns."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitlinear.cli.flags import COUNT, POSITIVE, from_arguments, path
from vitlinear.cli.parser import Parser
from vitlinear.errors import UserError, did_you_mean, pip_install
from vitlinear.files import check_results, write_text
from vitlinear.processor import cpu_model
from vitlinear.revision import source_commit, versions

from . import programs
from .programs import Program, Size
from .report import plot, print_report
from .runtimes import RUNTIMES, check_runtime
from .subject import Case, serve
from .turns import KEEP_PAGES, measure

PICTURES = (".png", ".svg")
PACKAGES = ("torch", "timm", "onnxruntime", "openvino", "vitlinear")


@dataclass(frozen=True)
class BenchmarkConfig:
    """The flags of ``vitlinear benchmark``."""

    models: tuple[str, ...]
    runtime: tuple[str, ...]
    sizes: tuple[str, ...]
    batch_size: int
    threads: int
    reference: str | None
    profile: bool
    rounds: int
    seconds: float
    timeout: float
    output: Path | None
    plot: Path | None


def parse_arguments(
    argv: Sequence[str] | None, prog: str = "vitlinear benchmark"
) -> BenchmarkConfig:
    """Returns the configuration that a command line asks for."""
    parser = Parser(
        prog=prog,
        description="Time of models in PyTorch (fused, inference mode), onnxruntime and OpenVINO "
        "on this CPU, in float32 with random weights. All of one size take turns.",
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL",
        help="a model of this package or of timm, or an ONNX file, such as one in int8",
    )  # fmt: skip
    parser.add_argument(
        "--runtime", nargs="+", choices=RUNTIMES, default=["pytorch", "onnxruntime", "openvino"]
    )
    parser.add_argument(
        "--sizes", nargs="+", default=["224"], metavar="SIZE", help="224, or 480x640: height first"
    )
    parser.add_argument("-b", "--batch-size", type=COUNT, default=1, metavar="N", help="images")
    parser.add_argument("--threads", type=COUNT, default=torch.get_num_threads(), metavar="N")
    parser.add_argument(
        "--reference", default=None, metavar="MODEL", help="of the last ratio (default: the first)"
    )
    parser.add_argument(
        "--profile", action="store_true",
        help="also ask each runtime what its products and convolutions take",
    )  # fmt: skip
    group = parser.add_argument_group("measurement")
    group.add_argument("--rounds", type=COUNT, default=7, metavar="N", help="turns of each row")
    group.add_argument("--seconds", type=POSITIVE, default=0.5, metavar="S", help="of a turn")
    group.add_argument(
        "--timeout", type=POSITIVE, default=600.0, metavar="S", help="to prepare or answer in"
    )
    group = parser.add_argument_group("results")
    group.add_argument("--output", type=path, default=None, metavar="FILE.json")
    group.add_argument(
        "--plot", type=path, default=None, metavar="FILE", help="images/s, as .png or .svg"
    )
    return from_arguments(BenchmarkConfig, parser.parse_args(argv))


def _check(config: BenchmarkConfig, sizes: Sequence[Size]) -> None:
    """Raises `UserError` for what cannot be measured, before anything is."""
    for name in config.runtime:
        check_runtime(name)
    files = any(RUNTIMES[name].takes_files for name in config.runtime)
    for model, size in itertools.product(config.models, sizes):
        if not programs.is_file(model):
            programs.multiply_adds(model, size)
        elif not files:
            raise UserError(f"{model} is a file: add --runtime onnxruntime or openvino")
        else:
            check_runtime("onnxruntime")
            programs.check_file(model, size)
    names = [programs.label(each) for each in config.models]
    if len(set(names)) < len(names):
        raise UserError("two MODELs have the same name: give each once")
    if config.reference not in (None, *names):
        hint = did_you_mean(str(config.reference), names)
        raise UserError(f"--reference {config.reference} is not among the models{hint}")
    check_results({"--output": config.output, "--plot": config.plot}, config.models)
    if config.plot and config.plot.suffix not in PICTURES:
        raise UserError(f"--plot {config.plot}: its name has to end with {' or '.join(PICTURES)}")
    if config.plot and importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"--plot needs matplotlib: {pip_install('train')}")


def _rows(config: BenchmarkConfig, size: Size) -> list[dict[str, Any]]:
    """The rows of one size, which take turns."""
    runtimes = [name for name in config.runtime if RUNTIMES[name].takes_files]
    cases = []
    with tempfile.TemporaryDirectory(prefix="vitlinear-benchmark-") as folder:
        for model in config.models:
            if programs.is_file(model):
                program = programs.of_file(model, size)
            else:
                program = programs.of_model(model, size, Path(folder), runtimes)
            cases += _cases(config, size, program)
        rows = measure(serve, cases, config.rounds, config.seconds, config.timeout)
    for row in rows:
        for name in ("file", "obstacle", "expected", "profiled"):  # of this run alone
            del row[name]
    return rows


def _cases(config: BenchmarkConfig, size: Size, program: Program) -> list[Case]:
    return [
        Case(
            program.model,
            runtime,
            size.batch,
            size.height,
            size.width,
            config.threads,
            program.origin,
            program.files.get(runtime),
            program.obstacle,
            program.expected,
            program.gmacs,
            config.profile,
        )
        for runtime in dict.fromkeys(config.runtime)
        if RUNTIMES[runtime].takes_files or not programs.is_file(program.model)
    ]


def main(argv: Sequence[str] | None, prog: str = "vitlinear benchmark") -> None:
    """Runs ``vitlinear benchmark``."""
    argv = sys.argv[1:] if argv is None else argv
    config = parse_arguments(argv, prog)
    sides = dict.fromkeys(programs.parse_sides(each) for each in config.sizes)
    sizes = [Size(config.batch_size, *each) for each in sides]
    _check(config, sizes)
    os.environ.update(KEEP_PAGES)
    record: dict[str, Any] = {
        "command": shlex.join(["vitlinear", "benchmark", *argv]),
        "machine": f"{cpu_model()}, {os.cpu_count()} cores; {config.threads} threads used",
        "load": os.getloadavg()[0],
        "commit": source_commit() or "not known",
        "versions": versions(PACKAGES),
        "reference": config.reference or programs.label(config.models[0]),
        "rows": [],
    }
    for count, size in enumerate(sizes, 1):
        print(f"[{count}/{len(sizes)}] {size}", file=sys.stderr, flush=True)
        record["rows"] += _rows(config, size)
        measured = any("error" not in row for row in record["rows"])
        if config.output and measured:  # now: a later size may be interrupted
            write_text(config.output, json.dumps(record, indent=1) + "\n")
    print_report(record)
    if not measured:
        raise UserError("nothing could be measured; the table says why")
    if config.plot:
        plot(record, config.plot)
