"""Models of timm or ours at one size, as modules and as ONNX programs."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitlinear.checkpoints.card import Card
from vitlinear.create import build_model, check_model_name, data_config
from vitlinear.errors import UserError, one_line
from vitlinear.export import Shapes, export
from vitlinear.export.channels_first import RUNTIMES, is_rewritable
from vitlinear.export.shapes import Range

SUFFIX = ".onnx"
SEED = 0  # of weights and images: each process makes the same


@dataclasses.dataclass(frozen=True)
class Size:
    """Images of a batch, and their height and width in pixels."""

    batch: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.height} x {self.width}"


@dataclasses.dataclass(frozen=True)
class Program:
    """A model at one size.

    Attributes:
        model: Its name, or that of its file.
        origin: Name of the model that it was made of; empty if it is not known.
        files: ONNX, for each runtime that takes files; those of several may be one.
        obstacle: Why there are none for the others; empty where nothing was in the way.
        expected: File with the logits of the fused model, [B, classes]; None if nobody knows them.
        gmacs: Multiply-adds of one image, in units of 1e9; None if nobody knows them.
    """

    model: str
    origin: str
    files: Mapping[str, str]
    obstacle: str
    expected: str | None
    gmacs: float | None


def parse_sides(text: str) -> tuple[int, int]:
    """Returns the height and width that ``224`` or ``480x640`` mean.

    Raises:
        UserError: It is neither.
    """
    sides = text.lower().split("x")
    if not (1 <= len(sides) <= 2 and all(side.isdecimal() and int(side) for side in sides)):
        raise UserError(f"--sizes: '{text}' is neither a side in pixels nor HEIGHTxWIDTH")
    return int(sides[0]), int(sides[-1])


def images(size: Size) -> Tensor:
    """Random images, always the same, [B, 3, H, W]."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(size.batch, 3, size.height, size.width, generator=generator)


def fused(name: str, size: Size) -> nn.Module:
    """A model for images of that size as one runs it: random weights, eval mode, fused.

    Raises:
        UserError: No model of this name can be built for that size.
    """
    torch.manual_seed(SEED)
    model = build_model(name, sizes={"input_size": (3, size.height, size.width)}).eval()
    return folded(model)


def folded(model: nn.Module) -> nn.Module:
    """A model with what its family folds for inference; a new module, or the same one changed."""
    fuse = getattr(model, "fuse", None)
    return fuse() if callable(fuse) else reparameterize_model(model)


def counted(model: nn.Module, sides: tuple[int, int, int]) -> int:
    """Multiply-adds of one image in convolutions, linear layers and matrix products.

    Those of attention too, fused or not; nothing else. Nothing is computed.

    Args:
        model: On the meta device, in eval mode.
        sides: Channels, height and width of the image.
    """
    image = torch.empty(1, *sides, device="meta", dtype=next(model.parameters()).dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2


@functools.cache  # of each model asked for twice: before anything is measured, and in its row
def multiply_adds(name: str, size: Size) -> int:
    """Multiply-adds of one image, as `counted` has them.

    Raises:
        UserError: The model is unknown, or takes no images of that size.
    """
    check_model_name(name)
    sides = (3, size.height, size.width)
    model = build_model(name, device="meta", sizes={"input_size": sides}).eval()
    try:
        return counted(model, sides)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"{name} takes no images of {size.height} x {size.width} pixels: {one_line(error)}; "
            "give other --sizes"
        ) from error


def is_file(model: str) -> bool:
    """Whether a model is given as an ONNX file."""
    return model.endswith(SUFFIX)


def label(model: str) -> str:
    """The name that the rows of a model have: of a file, that without its folder."""
    return Path(model).name if is_file(model) else model


def check_file(path: str, size: Size) -> str:
    """Returns the name of the model that an ONNX file says it was made of; empty if it does not.

    Empty too where that model was built otherwise than by its name; its classifier does not count.

    Raises:
        UserError: There is no such file, or it is no ONNX program for images of that size.
    """
    import onnx

    if not Path(path).expanduser().is_file():
        raise UserError(f"{path} does not exist")
    try:
        program = onnx.load(Path(path).expanduser(), load_external_data=False)
        images = program.graph.input[0].type.tensor_type
        takes, kind = images.shape.dim, onnx.TensorProto.DataType.Name(images.elem_type)
        shaped = images.HasField("shape")
    except Exception as error:  # protobuf's own classes
        raise UserError(f"{path} is no ONNX program: {one_line(error)}") from error
    if kind not in ("FLOAT", "FLOAT16", "DOUBLE"):
        raise UserError(
            f"{path} takes {kind.lower()}: its images have to be normalised, in floating point"
        )
    if not shaped:
        raise UserError(
            f"{path} does not say which images it takes: its first input needs a shape, such as "
            "batch x 3 x height x width"
        )
    wanted = (size.batch, 3, size.height, size.width)
    fits = len(takes) == 4 and all(
        not each.HasField("dim_value") or each.dim_value == side
        for each, side in zip(takes, wanted, strict=True)
    )
    if not fits:
        fixed = " x ".join(str(each.dim_value or each.dim_param) for each in takes)
        asked = " x ".join(map(str, wanted))
        raise UserError(f"{path} takes images of {fixed}, not {asked}: give other --sizes")
    return _origin({each.key: each.value for each in program.metadata_props})


def _origin(metadata: Mapping[str, str]) -> str:
    """The model that metadata name, if a model of that name is the same as it."""
    if not metadata.get("made_by", "vitlinear").startswith("vitlinear"):
        return ""  # another tool's metadata
    try:
        built = json.loads(metadata.get("model_kwargs", "{}"))
    except ValueError:
        return ""
    if not isinstance(built, dict) or built.keys() - {"attn_backend", "img_size"}:
        return ""
    return metadata.get("model", "")


def of_file(path: str, size: Size) -> Program:
    """The program of a file."""
    # Not what a link leads to: data beside a program lie beside the link.
    file = os.path.abspath(Path(path).expanduser())
    return Program(
        label(path), check_file(path, size), dict.fromkeys(RUNTIMES, file), "", None, None
    )


def of_model(name: str, size: Size, folder: Path, runtimes: Sequence[str]) -> Program:
    """The program of a model.

    Args:
        name: Of timm's or ours.
        size: Of the images.
        folder: For files.
        runtimes: To write ONNX for, as `vitlinear export` does at fixed sizes: verified.

    Raises:
        UserError: It cannot be built.
    """
    cost = multiply_adds(name, size) / 1e9
    model = fused(name, size)
    with torch.inference_mode():
        logits = model(images(size))
    own = Path(tempfile.mkdtemp(dir=folder))
    expected = str(own / "logits.npy")
    np.save(expected, logits.numpy())
    written: dict[str, str | None] = {}
    files: dict[str, str] = {}
    obstacle = ""
    for runtime in runtimes:
        form = runtime if is_rewritable(model) else "any"
        if form not in written:
            file = own / f"{form}{SUFFIX}"
            try:
                write(model, name, size, file, runtime)
                written[form] = str(file)
            except UserError as error:  # the model runs in PyTorch all the same
                written[form], obstacle = None, str(error)
        if (there := written[form]) is not None:
            files[runtime] = there
    return Program(name, name, files, obstacle, expected, cost)


def write(model: nn.Module, name: str, size: Size, file: Path, runtime: str) -> None:
    """Writes the ONNX program of a fused model for that size and for the speed of a runtime."""
    shapes = Shapes.of(
        name,
        3,
        Range(size.batch, size.batch),
        Range(size.height, size.height),
        Range(size.width, size.width),
    )
    config = dataclasses.replace(data_config(model, {}), input_size=(3, size.height, size.width))
    classes: Any = model.num_classes
    card = Card(name, {}, classes, 3, config, "RGB")
    metadata = {"model": name, "fused": json.dumps(True)}
    export(model, file, "onnx", shapes, card, metadata, runtime=runtime)
