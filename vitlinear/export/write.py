"""Writing a model, and reading back what was written: a file appears only if it computes the same.

A program is traced from the plain formula of attention, which every runtime can run; what is
written needs neither vitlinear nor, as ONNX, torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import logging
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import timm
import torch
from timm.models import get_model_args
from torch import Tensor, nn

from vitlinear.checkpoints.card import Card, read_card, save_weights
from vitlinear.errors import UserError, check_choice, one_line, pip_install
from vitlinear.files import check_new_file, write_atomically

from . import onnx_file
from .calibration import Calibration
from .channels_first import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    ONNXRUNTIME,
    RUNTIMES,
    InputSize,
    pays,
    rewrite,
)
from .quantise import quantise
from .shapes import Shapes

Run = Callable[[Tensor], Tensor]
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
AUTO = "auto"
LAYOUTS = (AUTO, CHANNELS_FIRST, CHANNELS_LAST)
METADATA_FILE = "metadata.json"  # beside the program, in a torch.export file
# Greatest difference from the model in float32: the norm of it over that of the logits. What int8
# may cost is its user's decision; beyond this it computes something else.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.int8: 1e-1}
ADVICE = {
    torch.float32: "report this model",
    torch.float16: "take --dtype float32, or only sizes near the model's own (--height, --width)",
    torch.int8: "give trained weights, more --calibration-images, or only sizes near the model's "
    "own (--height, --width); or take --dtype float16",
}


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        suffix: Of the file's name.
        write: Takes the model, its shapes, card and metadata, and the file.
        read: Returns what is in the file, as a function of images.
    """

    suffix: str
    write: Callable[[nn.Module, Shapes, Card, Mapping[str, str], Path], None]
    read: Callable[[Path], Run]


@dataclasses.dataclass(frozen=True)
class Written:
    """The result of `export`.

    Attributes:
        differences: Norm of the difference over that of the logits in float32, by the size it was
            measured at.
        layout: How maps lie in the program, and if not in all of it, why; empty for files without
            a program.
        left: What an int8 program computes in float32, for people; empty for others.
    """

    differences: dict[tuple[int, int, int, int], float]
    layout: str
    left: str = ""


def _trace(model: nn.Module, shapes: Shapes, example: Tensor) -> torch.export.ExportedProgram:
    try:
        program = torch.export.export(
            model, (example,), dynamic_shapes={"x": shapes.dynamic}, strict=False
        )
    except Exception as error:  # torch.export has no class for what it cannot do
        raise UserError(
            f"torch.export makes no program of this model for {shapes}; give one size "
            f"(--height 224 --width 224) or leave the sizes out: {one_line(error)[:300]}"
        ) from error
    ours = {
        str(node.target)
        for node in program.graph.nodes
        if str(node.target).startswith("vitlinear.")
    }
    if ours:
        raise UserError(
            f"the program would need vitlinear to run ({', '.join(sorted(ours))}): leave "
            "attn_backend and VITLINEAR_BACKEND at auto"
        )
    return program


def _write_program(
    model: nn.Module, shapes: Shapes, card: Card, metadata: Mapping[str, str], path: Path
) -> None:
    program = _trace(model, shapes, shapes.example())
    program.example_inputs = None  # images, which are of no use in the file
    # Through bytes: torch's own writer of files ends the process on a full disk.
    data = io.BytesIO()
    torch.export.save(program, data, extra_files={METADATA_FILE: json.dumps(metadata, indent=2)})
    path.write_bytes(data.getbuffer())


def _read_program(path: Path) -> Run:
    module: Run = torch.export.load(path).module()
    return module


def check_onnx_packages() -> None:
    """Raises `UserError` if what writes, checks or runs ONNX is not installed."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx needs {', '.join(missing)}: {pip_install('export')}")


def _write_onnx(
    model: nn.Module, shapes: Shapes, card: Card, metadata: Mapping[str, str], path: Path
) -> None:
    example = shapes.example().to(next(model.parameters()).dtype)
    try:
        program = torch.onnx.export(
            _trace(model, shapes, example),
            (example,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"x": shapes.dynamic},  # for their names alone
            dynamo=True,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(
            f"torch.onnx makes no ONNX of this model; --format torch-export needs none: "
            f"{one_line(error)[:300]}"
        ) from error
    assert program is not None
    onnx_file.save(program.model_proto, path, metadata)


def _read_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()
    numpy_type = {"tensor(float16)": torch.float16}.get(images.type, torch.float32)

    def run(x: Tensor) -> Tensor:
        (logits,) = session.run(None, {images.name: x.to(numpy_type).numpy()})
        return torch.from_numpy(logits)

    return run


def _write_weights(
    model: nn.Module, shapes: Shapes, card: Card, metadata: Mapping[str, str], path: Path
) -> None:
    save_weights(path, model.state_dict(), card, metadata)


def _read_weights(path: Path) -> Run:
    card = read_card(path)
    assert card is not None
    model: Run = timm.create_model(
        card.model,
        checkpoint_path=path,
        num_classes=card.num_classes,
        in_chans=card.in_chans,
        **card.model_kwargs,
    ).eval()
    return model


FORMATS = {
    "onnx": Format(".onnx", _write_onnx, _read_onnx),
    "torch-export": Format(".pt2", _write_program, _read_program),
    "safetensors": Format(".safetensors", _write_weights, _read_weights),
}


def check_target(path: Path, kind: str, overwrite: bool = False) -> None:
    """Raises `UserError` if a file of this name cannot be, or must not be written."""
    suffix = FORMATS[kind].suffix
    if path.suffix != suffix and not path.is_dir():
        raise UserError(f"cannot write {path}: for {kind} its name has to end with {suffix}")
    check_new_file(path, overwrite)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out what exporters say to their developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _scratch_folder(path: Path) -> Iterator[Path]:
    """A folder beside the file, for this long; gone after SIGTERM as well."""
    main = threading.current_thread() is threading.main_thread()
    # A program that handles the signal itself goes on doing so.
    takes_signals = main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if takes_signals:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            yield Path(folder)
    finally:
        if takes_signals:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@torch.no_grad()
def export(
    model: nn.Module,
    path: Path,
    kind: str,
    shapes: Shapes,
    card: Card,
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
    calibration: Calibration | None = None,
    overwrite: bool = True,
    layout: str = AUTO,
    runtime: str = ONNXRUNTIME,
) -> Written:
    """Write a model, and let the file appear once it was read back and gave the same.

    Args:
        model: In eval mode, in float32, on the CPU; may become one of `dtype`.
        path: The file.
        kind: Key in `FORMATS`.
        shapes: Sizes of the input that the program is for.
        card: What the model is.
        metadata: What else the file is to say of itself.
        dtype: Of the program, its images and logits; torch.int8: of its products with weights.
        calibration: For torch.int8, images to take ranges from, and others to check with, in
            place of random ones.
        overwrite: Replace a file of this name, one that appears meanwhile too.
        layout: One of `LAYOUTS`: how maps lie in the program. ``'channels-first'`` is the fused
            model, rewritten for runtimes of ONNX by `vitlinear.export.channels_first`;
            ``'channels-last'`` the model as it is; ``'auto'`` the first where it was measured to
            be faster, which is ONNX in float32 and int8.
        runtime: One of `channels_first.RUNTIMES`, for whose speed ``'auto'`` chooses the layout in
            float32, and ``'channels-first'`` the steps; other types have one program for all. The
            program runs in any, and its metadata name the runtime where it chose.

    Raises:
        UserError: What is written computes something else, or cannot be written; or the model has
            not the layout asked for; or an argument is none of those there are, or does not go
            with the others. Nothing is left.
    """
    check_form(kind, dtype, layout)
    check_choice("runtime", runtime, RUNTIMES)
    if (dtype == torch.int8) != (calibration is not None):
        raise UserError("calibration is for torch.int8, and torch.int8 needs it: give both or none")
    check_target(path, kind, overwrite)
    generator = torch.Generator().manual_seed(0)
    sizes = shapes.checked(*card.data_config.input_size[1:])
    try:
        images = [
            calibration.checks(size) if calibration else [torch.randn(size, generator=generator)]
            for size in sizes
        ]
        expected = [_outputs(model, batches) for batches in images]
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise UserError(
            f"too little memory to compare with the model at {' or '.join(map(_times, sizes))}: "
            "give smaller --batch, --height and --width"
        ) from error
    laid_out = left = ""
    if kind != "safetensors":
        chooses, asked = kind == "onnx" and dtype == torch.float32, layout
        if layout == AUTO and not takes_channels_first(model, kind, dtype, runtime):
            layout = CHANNELS_LAST
        model, laid_out = _lay_out(model, shapes, layout, runtime if chooses else None)
        metadata = {**metadata, "layout": laid_out}
        if laid_out.startswith(CHANNELS_FIRST):
            metadata["fused"] = json.dumps(True)
        if chooses and (laid_out.startswith(CHANNELS_FIRST) or layout != asked):
            metadata["runtime"] = runtime  # which chose the steps, or the layout
    try:
        with _scratch_folder(path) as folder:
            temporary = folder / path.name
            with _quiet():
                if dtype.is_floating_point:
                    model = model.to(dtype)
                FORMATS[kind].write(model, shapes, card, metadata, temporary)
                if calibration:
                    left = quantise(temporary, model, shapes, calibration)
                run = FORMATS[kind].read(temporary)
                differences = {
                    size: _difference(_outputs(run, batches), logits)
                    for size, batches, logits in zip(sizes, images, expected, strict=True)
                }
            for size, difference in differences.items():
                if not difference <= TOLERANCES[dtype]:  # also one that is not a number
                    raise UserError(
                        f"{path} was not written: at {_times(size)} it differs from the model by "
                        f"{difference:.1e} of the logits' norm, more than {TOLERANCES[dtype]:.0e}: "
                        f"{ADVICE[dtype]}"
                    )
            check_target(path, kind, overwrite)  # another process may have been quicker
            write_atomically(path, lambda place: shutil.move(temporary, place))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or one_line(error)}") from error
    return Written(differences, laid_out, left)


def takes_channels_first(model: nn.Module, kind: str, dtype: torch.dtype, runtime: str) -> bool:
    """Whether a program is to be channels-first if the model has that form."""
    if kind != "onnx" or dtype == torch.float16:
        return False
    return dtype != torch.float32 or pays(model, runtime)


def _lay_out(
    model: nn.Module, shapes: Shapes, layout: str, runtime: str | None
) -> tuple[nn.Module, str]:
    """The model to write a program of, and the layout of its maps."""
    if layout == CHANNELS_LAST:
        return model, CHANNELS_LAST
    size = None
    if shapes.height.fixed and shapes.width.fixed:
        batch = shapes.batch.low if shapes.batch.fixed else None
        size = InputSize(batch, shapes.height.low, shapes.width.low)
    model, rewritten = rewrite(model, size, runtime)
    if layout == CHANNELS_FIRST and not rewritten.stages:
        raise UserError(f"no --layout {CHANNELS_FIRST} of this model: it would be {rewritten}")
    return model, str(rewritten)


def check_form(kind: str, dtype: torch.dtype, layout: str) -> None:
    """Raises `UserError` if files of a kind do not come in a type, or not in a layout of `LAYOUTS`.

    States of channels-first programs are sums over all tokens, which are divided afterwards: a
    large map has more of them than float16 can hold.
    """
    check_choice("format", kind, FORMATS)
    check_choice("layout", layout, LAYOUTS)
    names = {each: str(each).removeprefix("torch.") for each in TOLERANCES}
    check_choice("dtype", names.get(dtype, repr(dtype)), names.values())
    if dtype != torch.float32 and kind != "onnx":
        raise UserError(f"--dtype {names[dtype]} is for --format onnx")
    if layout == CHANNELS_FIRST and kind != "onnx":
        raise UserError(f"--layout {CHANNELS_FIRST} is for --format onnx")
    if layout == CHANNELS_FIRST and dtype == torch.float16:
        raise UserError(
            f"--layout {CHANNELS_FIRST} has no form in float16, which its sums over all tokens "
            f"could overflow: take --dtype float32, or --layout {CHANNELS_LAST}"
        )


def _times(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _outputs(run: Run, batches: Sequence[Tensor]) -> Tensor:
    return torch.cat([run(batch) for batch in batches])


def _difference(logits: Tensor, expected: Tensor) -> float:
    return float((logits.float() - expected).norm() / expected.norm())


def model_kwargs(model: nn.Module) -> dict[str, object]:
    """Constructor arguments that make a model of these weights, beside classes and channels."""
    args = get_model_args(model)
    return {key: value for key, value in args.items() if key not in ("num_classes", "in_chans")}
