"""`parallelize`: a model whose layers exchange what they need of the rows of other processes."""

from __future__ import annotations

from typing import Any

import timm.layers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.modules.batchnorm import _BatchNorm

from vitlinear.errors import UserError
from vitlinear.layers import CeilConv
from vitlinear.layers.conv.depthwise_conv import DepthwiseConv
from vitlinear.layers.conv.head_shared_conv import HeadSharedConv
from vitlinear.models._contract import TimmBackbone
from vitlinear.models._isotropic import IsotropicBackbone
from vitlinear.rows.reach import row_convs
from vitlinear.rows.steps import Step, check_head, steps_of

from .agreement import structure
from .around import check_around, held_model, split_around
from .exchange import register_group
from .levels import Plan, Strided, plan_of
from .split_layers import (
    MapConv,
    Placed,
    PlacedStrided,
    SplitBatchNorm,
    SplitDropout,
    SplitDropPath,
    SplitLayer,
    SplitModel,
    SplitPool,
    SplitTokens,
    StridedConv,
    split,
)

_ROWS_SECOND = (DepthwiseConv, HeadSharedConv)  # these take maps [B, rows, W, C]


def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Let a model run on the rows of an image that a process has, in place.

    It then takes the part of `shard_rows` inside of its context, and gives maps of the own rows,
    and logits of the whole image. Parameters, their names, and the state dict stay. Nothing is
    exchanged here; wrappers such as `DistributedDataParallel` come after.

    Args:
        model: A model of this package, or a module that holds one, such as `MultiScaleBackbone`,
            of which all other layers treat places one by one.
        mesh: Of one dimension: the processes that share an image.

    Returns:
        The model.

    Raises:
        UserError: It has a layer that cannot be split into rows, which the message names; nothing
            is changed then.
    """
    if mesh.ndim != 1:
        raise UserError(
            f"rows are shared along one dimension of a mesh, got one of {mesh.ndim}: give a part "
            'of it, such as mesh["rows"]'
        )
    if any(isinstance(module, SplitLayer) for module in model.modules()):
        raise UserError("the model is parallelised already")
    backbone: Any = held_model(model)
    steps = steps_of(backbone, training=True)
    check_head(backbone, training=True)
    plan, levels = _plan_of(steps, backbone)
    _check_places(steps)
    pools = check_around(model, backbone)
    described = structure(model)
    for step, (before, after) in zip(steps, levels, strict=True):
        if step.strided:
            _split_strided(step, plan, before, after, backbone)
        else:
            _split_step(step, plan, after)
    for name, module in model.named_modules():  # those around the backbone too
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            split(module, SplitBatchNorm, name)
        elif isinstance(module, timm.layers.DropPath):
            split(module, SplitDropPath, name)
    stem: Any = next(iter(steps[0].modules.values()))
    stem.structure = described
    _split_head(backbone)
    split_around(model, backbone, pools, plan)
    register_group(mesh.get_group())
    return model


def _plan_of(steps: list[Step], model: TimmBackbone) -> tuple[Plan, list[tuple[int, int]]]:
    """The plan of a model, and for each step how many strided layers lie before and after it."""
    layers: list[Strided] = []
    levels = []
    for step in steps:
        before = len(layers)
        layers += _strided_of(step, model)
        levels.append((before, len(layers)))
    return plan_of(tuple(layers), getattr(model, "num_prefix_tokens", 0)), levels


def _strided_of(step: Step, model: TimmBackbone) -> list[Strided]:
    if not step.strided:
        return []
    found = []
    for module in step.modules.values():
        if getattr(module, "pads_odd_maps", False):
            found.append(Strided(step.name, 1, step.stride, 0, "pad"))
    layers = {name: module for top in step.modules.values() for name, module in _named(step, top)}
    for conv in step.convs:
        if conv.stride == 1:
            continue
        if _is_patches(step):
            rounding = "floor" if model.rounds_down else "ceil"
        else:
            rounding = "ceil" if isinstance(layers[conv.name], CeilConv) else "conv"
        found.append(Strided(conv.name, conv.kernel, conv.stride, conv.padding, rounding))
    return found


def _named(step: Step, top: nn.Module) -> list[tuple[str, nn.Module]]:
    name = next(name for name, module in step.modules.items() if module is top)
    return list(top.named_modules(prefix=name))


def _is_patches(step: Step) -> bool:
    """Whether a step is one convolution whose kernels do not overlap."""
    if len(step.convs) != 1:
        return False
    conv = step.convs[0]
    return conv.kernel == conv.stride and conv.padding == 0


def _check_places(steps: list[Step]) -> None:
    """Check that no module stands in two places, where it would have two levels.

    Raises:
        UserError: One does.
    """
    seen: dict[nn.Module, str] = {}
    for step in steps:
        for name, module in step.modules.items():
            if seen.setdefault(module, name) != name:
                raise UserError(
                    f"{name} is {seen[module]} as well: a layer that stands in two places cannot "
                    "be split into rows"
                )


def _split_strided(step: Step, plan: Plan, before: int, after: int, model: TimmBackbone) -> None:
    (name, top), *more = step.modules.items()
    assert not more
    pads = plan.layers[before].rounding == "pad"
    patches = _is_patches(step)
    if not patches:
        convs = {conv.name: conv for conv in row_convs(name, top, training=True)}
        level = before + pads
        for path, module in list(top.named_modules(prefix=name)):
            conv = convs.get(path)
            if conv is None:
                continue
            reach = (conv.kernel, conv.stride, conv.padding)
            if conv.kernel > 1 or conv.stride > 1:
                split(module, StridedConv, path, plan=plan, level=level, reach=reach)
            level += conv.stride > 1
    split(
        top,
        PlacedStrided,
        name,
        plan=plan,
        level=before,
        after=after,
        moves=patches or pads,
        axis_after=1 if isinstance(model, IsotropicBackbone) else 2,
    )


def _split_step(step: Step, plan: Plan, level: int) -> None:
    for name, top in step.modules.items():
        if isinstance(top, SplitLayer):  # what the blocks of a stage share
            continue
        for path, module in list(top.named_modules(prefix=name)):
            if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
                axis = 1 if isinstance(module, _ROWS_SECOND) else 2
                reach = module.dilation[0] * (module.kernel_size[0] - 1) // 2
                split(module, MapConv, path, axis=axis, padding_rows=reach)
        if type(top) is not nn.Dropout:
            split(top, Placed, name, plan=plan, level=level, prefix=plan.prefix)


def _split_head(model: Any) -> None:
    if isinstance(model, IsotropicBackbone):
        if model.global_pool:
            split(model.head_drop, SplitDropout, "head_drop")
        split(model, SplitTokens, "the model")
        return
    if model.head.global_pool.pool_type:
        split(model.head.drop, SplitDropout, "head.drop")
    split(model.head.global_pool, SplitPool, "head.global_pool")
    split(model, SplitModel, "the model")
