"""Modules that hold a parallelised model, such as a dense backbone, and their other layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitlinear.errors import UserError
from vitlinear.models._contract import TimmBackbone
from vitlinear.rows.reach import check_layer

from .levels import Plan
from .shards import rows_here
from .split_layers import SplitDropout, SplitLayer, split


def held_model(module: nn.Module) -> nn.Module:
    """The one model of this package that a module holds; itself if it is one or holds none.

    Raises:
        UserError: It holds several.
    """
    if isinstance(module, TimmBackbone):
        return module
    found = {name: part for name, part in module.named_modules() if isinstance(part, TimmBackbone)}
    if len(found) > 1:
        raise UserError(
            f"{type(module).__name__} holds several models, {', '.join(found)}: parallelise each"
        )
    return next(iter(found.values()), module)


def check_around(module: nn.Module, model: nn.Module) -> dict[str, nn.MaxPool2d]:
    """Check that layers around a model treat places of its maps one by one.

    Args:
        module: Holds them.
        model: Left out, with its layers.

    Returns:
        By name, poolings, for which cuts have to lie at multiples of their strides.

    Raises:
        UserError: A layer does not; the message names it.
    """
    inside, pools = set(model.modules()), {}
    for name, layer in module.named_modules():
        if layer in inside or isinstance(layer, (nn.ModuleList, nn.ModuleDict)):
            continue
        what = name or "the module itself"
        if isinstance(layer, nn.MaxPool2d) and _fits_together(layer):
            pools[what] = layer
        elif not (isinstance(layer, nn.ConvTranspose2d) and _fits_together(layer)):
            check_layer(what, layer, training=True)
            if isinstance(layer, nn.Conv2d) and layer.kernel_size[0] > 1:
                raise UserError(
                    f"{what} (Conv2d) stands around the model and looks at rows of other "
                    "processes: give the model alone"
                )
    return pools


def _fits_together(layer: Any) -> bool:
    """Whether kernels lie side by side from the first row on."""

    def rows(value: Any) -> int:
        return int(value[0] if isinstance(value, tuple) else value)

    return (
        rows(layer.kernel_size) == rows(layer.stride)
        and not rows(layer.padding)
        and not rows(getattr(layer, "output_padding", 0))
        and rows(layer.dilation) == 1
    )


class DropoutAround(SplitDropout):
    """Dropout behind a model: of maps each process draws for its own rows."""

    def forward(self, x: Tensor) -> Tensor:
        """As the layer; of pooled features [B, C], which are the same on all, the first draws."""
        return super().forward(x) if x.dim() == 2 else super(SplitDropout, self).forward(x)


class SplitMaxPool(SplitLayer):
    """A pooling of the last map of a model, [B, C, rows, W].

    Attributes:
        plan: Of the model.
    """

    plan: Plan

    def forward(self, x: Tensor) -> Tensor:
        """As the layer.

        Raises:
            UserError: A process begins amid the rows that are pooled, or it is another map.
        """
        pool: Any = self
        stride = pool.stride if isinstance(pool.stride, int) else pool.stride[0]
        rows = rows_here(self.split_name)
        level = rows.band(self.plan, len(self.plan.layers)).level
        start, stop = level.cuts[rows.rank]
        if x.shape[2] != stop - start:
            raise UserError(
                f"{self.split_name} pools a map of which this process has {x.shape[2]} rows, and "
                f"it has {stop - start} of the last map of the model: poolings around a model can "
                "be split on that map alone; pool after gather_rows, or give the model alone"
            )
        for start, _ in level.cuts:
            if start % stride:
                raise UserError(
                    f"{self.split_name} pools {stride} rows, and a process begins at row {start} "
                    f"of {level.height}: cut images at multiples of {stride} rows of the last map"
                )
        return super().forward(x)


def split_around(
    module: nn.Module, model: nn.Module, pools: dict[str, nn.MaxPool2d], plan: Plan
) -> None:
    """Split dropout and poolings around a model.

    Args:
        module: Holds them.
        model: Left out, with its layers.
        pools: As `check_around` returned them; they look at where processes begin.
        plan: Of the model.
    """
    inside = set(model.modules())
    for name, layer in list(module.named_modules()):
        if layer not in inside and isinstance(layer, nn.Dropout):
            split(layer, DropoutAround, name)
    for name, pool in pools.items():
        split(pool, SplitMaxPool, name, plan=plan)
