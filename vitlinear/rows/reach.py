"""How far the layers of a step look along the rows of a map; unknown layers are refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import timm.layers
from torch import nn

from vitlinear.errors import UserError
from vitlinear.layers.band import BANDED, LOCAL, method_of

# Layers of PyTorch and timm that treat places one by one, or hand on to their members.
_LOCAL_LAYERS = {
    nn.modules.batchnorm._BatchNorm, nn.Conv2d,
    nn.Dropout, nn.GELU, nn.Identity, nn.LayerNorm, nn.LeakyReLU, nn.Linear, nn.ReLU,
    nn.RMSNorm, nn.Sequential, nn.Sigmoid, nn.SiLU, nn.SyncBatchNorm, timm.layers.DropPath,
    timm.layers.LayerNorm, timm.layers.LayerNorm2d, timm.layers.LayerScale,
    timm.layers.LayerScale2d, timm.layers.PatchEmbed,
}  # fmt: skip


class RowConv(NamedTuple):
    """A convolution along the rows."""

    name: str
    kernel: int  # rows from the first that it takes to the last
    stride: int
    padding: int


def definer(module: nn.Module, method: str = "forward") -> type:
    """The class that a method of a module stands in."""
    return next(kind for kind in type(module).__mro__ if method in vars(kind))


def row_rule(module: nn.Module, method: str = "forward") -> str | None:
    """How rows reach a method of a module, as its class says; None if that is not known."""
    kind = definer(module, method)
    if kind in _LOCAL_LAYERS:
        return LOCAL
    rule: str | None = vars(kind).get("row_rule")
    inner = method_of(rule)
    return rule if inner is None else row_rule(module, inner)


def check_layer(
    name: str, module: nn.Module, method: str = "forward", training: bool = False
) -> None:
    """Check that a layer says how rows reach it, its members left out.

    Args:
        name: In the model.
        module: The layer.
        method: Which the rule has to be about.
        training: Let it be in training mode, and use statistics of the image.

    Raises:
        UserError: It does not, or what it does depends on more than its class.
    """
    what = f"{name} ({type(module).__name__})"
    if row_rule(module, method) not in (LOCAL, BANDED) or method in module.__dict__:
        raise UserError(
            f"{what} cannot run on bands of rows: nothing says how it mixes them; its class needs "
            "a row_rule (vitlinear/layers/band.py)"
        )
    hooks = {**module._forward_hooks, **module._forward_pre_hooks}.values()
    if any(hook.__module__ != "vitlinear.dense.padding" for hook in hooks):
        raise UserError(
            f"{what} cannot run on bands of rows: it has forward hooks, which would see bands "
            "instead of the image; remove them"
        )
    if training:
        return
    # What `fuse` makes is in training mode, and has none of its own.
    if module.training and not isinstance(module, (nn.Sequential, nn.Identity)):
        raise UserError(f"{what} is in training mode: call model.eval() first")
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
        raise UserError(
            f"{what} cannot run on bands of rows: it has no running statistics and takes those of "
            "the image"
        )


def row_convs(name: str, module: nn.Module, training: bool = False) -> Iterator[RowConv]:
    """The convolutions of a module, in order, all its layers checked.

    Args:
        name: In the model.
        module: The module.
        training: As `check_layer`.

    Raises:
        UserError: As `check_layer`, or a convolution pads with anything but zeros.
    """
    for path, layer in module.named_modules(prefix=name):
        if isinstance(layer, nn.ModuleList):
            continue
        check_layer(path, layer, training=training)
        if hasattr(layer, "row_conv"):
            yield RowConv(path, *layer.row_conv)
        elif isinstance(layer, nn.Conv2d):
            if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
                raise UserError(
                    f"{path} cannot run on bands of rows: it pads with "
                    f"{layer.padding_mode} by {layer.padding!r}, not with a number of zeros"
                )
            kernel = layer.dilation[0] * (layer.kernel_size[0] - 1) + 1
            yield RowConv(path, kernel, layer.stride[0], layer.padding[0])


def row_reach(name: str, module: nn.Module, height: int, training: bool = False) -> int:
    """Rows above and below that a module needs for a row of its output; it keeps their number.

    An upper bound: as if its members stood one after the other.

    Args:
        name: In the model.
        module: The module.
        height: Rows of the whole map.
        training: As `check_layer`.

    Raises:
        UserError: As `row_convs`, or a convolution changes the number of rows.
    """
    total = 0
    for conv in row_convs(name, module, training):
        if conv.stride != 1 or 2 * conv.padding != conv.kernel - 1:
            raise UserError(
                f"{conv.name} cannot run on bands of rows: it stands in a block and changes the "
                "number of rows"
            )
        total += conv.padding
    layers: list[Any] = [layer for layer in module.modules() if hasattr(layer, "row_reach")]
    return total + sum(layer.row_reach(height) for layer in layers)


class Rows(NamedTuple):
    """A range of rows."""

    start: int
    stop: int


def rows_needed(convs: list[RowConv], own: Rows, height: int) -> Rows:
    """Rows that convolutions in a row need for some rows of their output.

    Args:
        convs: In order.
        own: Of the output.
        height: Rows of the input.

    Returns:
        Rows of the input. The first one is a multiple of the strides.
    """
    start, stop = own
    for conv in reversed(convs):
        start = start * conv.stride - conv.padding
        stop = (stop - 1) * conv.stride - conv.padding + conv.kernel
    stride = math.prod(conv.stride for conv in convs)
    return Rows(max(start // stride * stride, 0), min(stop, height))
