"""The ``tune`` command: checks the kernels on this GPU, times them, and keeps what is faster."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from vitlinear.cards.info import check_name
from vitlinear.cli.device import choose_device
from vitlinear.cli.flags import COUNT, from_arguments
from vitlinear.cli.parser import Parser
from vitlinear.errors import UserError
from vitlinear.files import check_parent, write_text
from vitlinear.ops import MECHANISMS, Workload, backend, choose_backend, gpu, kernel_cache
from vitlinear.ops.measurements import Measurement, as_seeds
from vitlinear.ops.workload import Kind

from . import calls, measure

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class TuneConfig:
    """The flags of ``vitlinear tune``."""

    model: str | None
    sizes: tuple[int, ...]
    batch_size: int
    dtype: str
    device: str
    compiled: bool
    export: str | None


def parse_arguments(argv: Sequence[str] | None, prog: str = "vitlinear tune") -> TuneConfig:
    """Returns the configuration that a command line asks for."""
    parser = Parser(
        prog=prog,
        description="Checks every kernel against the float64 formula on this GPU, times the "
        "kernels against the formula, eager and compiled, and keeps what the backend `auto` is "
        "to take: in the user's cache, for this GPU, driver and version.",
    )
    parser.add_argument(
        "model", nargs="?", default=None, metavar="MODEL",
        help="time the attention calls of this model; by default a few of every mechanism",
    )  # fmt: skip
    parser.add_argument(
        "--sizes", type=COUNT, nargs="+", default=[224], metavar="N", help="square images"
    )
    parser.add_argument(
        "--batch-size", type=COUNT, default=64, metavar="N",
        help="images of the smallest size; of a larger one as many as have that many pixels",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of q, k and v")
    parser.add_argument("--device", default="cuda", metavar="DEV", help="such as cuda:1")
    parser.add_argument(
        "--no-compiled", dest="compiled", action="store_false",
        help="leave out torch.compile, which takes longest",
    )  # fmt: skip
    parser.add_argument(
        "--export", default=None, metavar="FILE",
        help="also write the measurements to a file that can ship with the package",
    )  # fmt: skip
    return from_arguments(TuneConfig, parser.parse_args(argv))


def main(argv: Sequence[str] | None, prog: str = "vitlinear tune") -> None:
    """Runs ``vitlinear tune``."""
    config = parse_arguments(argv, prog)
    check_parent(config.export)
    if config.model is not None:
        check_name(config.model)
    device = choose_device(config.device)
    dtype = getattr(torch, config.dtype)
    here = _describe(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the one whose time Triton takes
    works = _works(config, dtype, device)
    failed = _check(works, dtype, device)
    bandwidth = measure.copy_bandwidth(device)
    timed: list[measure.Timed] = []
    try:
        for each in _time(works, failed, config.compiled, here):
            timed.append(each)
    finally:  # what was timed counts, whatever has ended the rest
        backend.decide_anew()
        if timed:
            print(f"\n{here.name}, copy {bandwidth / 1e12:.3g} TB/s\n")
            print(table(timed, bandwidth))
            path = kernel_cache.path_for(here)
            print(f"\nkept in {path}" if path.exists() else "\nkept nowhere: see the warning above")
        if timed and config.export is not None:
            known = kernel_cache.known(here)
            text = json.dumps(as_seeds(here, known.rows, known.blocks), indent=1)
            write_text(Path(config.export), text + "\n")
            print(f"written to {config.export}")


def _describe(device: torch.device) -> gpu.Gpu:
    """The GPU that a device is.

    Raises:
        UserError: It is none, or the kernels are not made for it.
    """
    if device.type not in gpu.DEVICES:
        raise UserError(f"--device {device}: the kernels run on GPUs alone; there is one as cuda")
    here = gpu.describe(device.index)
    if obstacle := gpu.obstacle(here):
        raise UserError(f"the kernels cannot run here: {obstacle}")
    return here


def _works(config: TuneConfig, dtype: torch.dtype, device: torch.device) -> list[Workload]:
    if config.model is None:
        return calls.of_mechanisms(config.batch_size, dtype, device)
    return calls.of_model(config.model, config.sizes, config.batch_size, dtype, device)


def _check(works: Iterable[Workload], dtype: torch.dtype, device: torch.device) -> dict[Kind, str]:
    """Check every mechanism, and every kind of call among these; returns why some failed."""
    others = calls.of_mechanisms(1, dtype, device, MECHANISMS)
    kinds = dict.fromkeys(work.kind for work in (*works, *others))
    failed: dict[Kind, str] = {}
    with tqdm(kinds, desc="check", leave=False, disable=None) as bar:
        for kind in bar:
            bar.set_postfix_str(kind.label)
            if reason := backend.check_kernels(kind, warn=False):
                failed[kind] = reason
    print(f"checked {len(kinds)} kinds of call: {len(kinds) - len(failed)} right")
    for kind, reason in failed.items():
        print(f"  {kind.label}: {reason}")
    return failed


def _time(
    works: Sequence[Workload], failed: dict[Kind, str], compiled: bool, here: gpu.Gpu
) -> Iterator[measure.Timed]:
    """Time each call on everything that may run it, and keep its times and block sizes at once."""
    from vitlinear.ops.triton import kept  # loads Triton itself

    names = ("eager", "compiled") if compiled else ("eager",)

    with kept.measuring() as blocks, tqdm(works, desc="time", leave=False, disable=None) as bar:
        for work in bar:
            bar.set_postfix_str(f"{work.kind.label}, {work.length} tokens")
            # What is wrong is not timed, lest it be taken.
            kernels = ("triton", "states") if measure.has_states(work) else ("triton",)
            implementations = names if work.kind in failed else (*kernels, *names)
            each = measure.time_call(work, implementations)
            if work.kind in failed:
                each.errors["triton"] = "failed its check"
            row = each.measurement()

            def learn(known: kernel_cache.Known, row: Measurement | None = row) -> None:
                _replace(known.rows, [] if row is None else [row])
                known.blocks.update(blocks)

            kernel_cache.add(here, learn)
            yield each


def _replace(rows: list[Measurement], new: Iterable[Measurement]) -> None:
    """Put measurements in the place of earlier ones of the same calls."""
    times = ("triton_ms", "eager_ms", "compiled_ms")

    def call(row: Measurement) -> tuple[object, ...]:
        return tuple(value for name, value in row._asdict().items() if name not in times)

    kept = {call(row): row for row in (*rows, *new)}
    rows[:] = kept.values()


def table(timed: Iterable[measure.Timed], bandwidth: float) -> str:
    """The times for people, with what `auto` takes from now on."""
    header = ("attention", "B x N x h x D", "terms", "use", "kernels ms", "share of copy",
              "by states ms", "eager ms", "compiled ms", "auto takes")  # fmt: skip
    rows = [header]
    for each in timed:
        work, share = each.work, each.share(bandwidth)
        choice = choose_backend("auto", work, may_check=False)
        cells = {
            name: f"{each.milliseconds[name]:.3f}"
            if name in each.milliseconds
            else each.errors.get(name, "")
            for name in ("triton", "states", "eager", "compiled")
        }
        rows.append(
            (
                work.mechanism,
                f"{work.batch} x {work.length} x {work.heads} x {work.head_dim}",
                "+".join(work.kind.terms) or "none",
                "training" if work.training else "inference",
                cells["triton"],
                "" if share is None else f"{share:.0%}",
                cells["states"],
                cells["eager"],
                cells["compiled"],
                choice.backend,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
