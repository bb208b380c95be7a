"""The one step that makes a model of layers on maps [B, C, H, W], stage by stage."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from vitlinear.errors import check_choice
from vitlinear.models._isotropic import IsotropicBackbone
from vitlinear.models._stages import StagedBackbone

from .blocks import ChannelsFirstStage, ChannelsFirstTokens
from .layers import MapSize, NoForm, affine_channel_norm
from .runtimes import RUNTIMES, choose_steps

CHANNELS_FIRST, CHANNELS_LAST = "channels-first", "channels-last"


class InputSize(NamedTuple):
    """The size of all images that a program takes.

    Attributes:
        batch: None where it varies.
        height: In pixels.
        width: In pixels.
    """

    batch: int | None
    height: int
    width: int


@dataclass(frozen=True)
class Rewritten:
    """How much of a model was rewritten.

    Attributes:
        stages: Stages on maps [B, C, H, W].
        of: All stages.
        left: What keeps others as they are: names of classes, or attentions.
    """

    stages: int
    of: int
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.stages == self.of:
            return CHANNELS_FIRST
        left = ", ".join(self.left)
        if not self.stages:
            return f"{CHANNELS_LAST}, as {left} has no other form"
        return f"{CHANNELS_FIRST} in {self.stages} of {self.of} stages, not in those of {left}"


def _sizes(model: nn.Module, parts: list[nn.Module], size: InputSize | None) -> list[Any]:
    """The size of the map that each part puts out; None where it varies."""
    if size is None:
        return [None] * len(parts)
    sizes: dict[nn.Module, MapSize] = {}

    def note(part: nn.Module, inputs: Any, out: Tensor) -> None:
        sizes[part] = MapSize(size.batch, *out.shape[1:], out.dtype)

    hooks = [part.register_forward_hook(note) for part in parts]
    try:
        dtype = next(model.parameters()).dtype
        model(torch.zeros(1, model.in_chans, size.height, size.width, dtype=dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return [sizes[part] for part in parts]


def is_rewritable(model: nn.Module) -> bool:
    """Whether `rewrite` knows a model's kind; programs of others are the same for all runtimes."""
    return isinstance(model, StagedBackbone | IsotropicBackbone)


@torch.no_grad()
def rewrite(
    model: nn.Module, size: InputSize | None = None, runtime: str | None = None
) -> tuple[nn.Module, Rewritten]:
    """Make the same model with as many stages on maps [B, C, H, W] as have that form.

    What is made is fused. Its outputs are those of the model, but for roundings. Its parameters
    have other names, orders and shapes, which no checkpoint fits.

    Args:
        model: In eval mode; stays as it is.
        size: Of all inputs; None where heights and widths vary. Tables of positions are then made
            in the program, and windows have no such form.
        runtime: One of `RUNTIMES`, for whose speed steps are chosen; None for convolutions alone,
            as for programs that will be quantised.

    Returns:
        The model that was made, or the same one if no stage has the form; and what was rewritten.

    Raises:
        ValueError: The model is in training mode.
        UserError: There is no such runtime.
    """
    if runtime is not None:
        check_choice("runtime", runtime, RUNTIMES)
    if not is_rewritable(model):
        return model, Rewritten(0, 1, (type(model).__name__,))
    made = copy.deepcopy(model)
    made.fuse()
    stages, left = (
        _tokens(made, size) if isinstance(made, IsotropicBackbone) else _stages(made, size)
    )
    done = sum(isinstance(stage, ChannelsFirstStage | ChannelsFirstTokens) for stage in stages)
    rewritten = Rewritten(done, len(stages), tuple(dict.fromkeys(left)))
    if not done:
        return model, rewritten
    if isinstance(made, IsotropicBackbone):
        made.blocks = nn.ModuleList(stages)
    else:
        made.stages = nn.Sequential(*stages)
        for module in list(made.modules()):
            for name, child in module.named_children():
                if isinstance(child, LayerNorm2d):
                    with contextlib.suppress(NoForm):
                        setattr(module, name, affine_channel_norm(child))
    if runtime is not None:
        choose_steps(made, runtime, fixed=size is not None)
    return made, rewritten


def _stages(model: StagedBackbone, size: InputSize | None) -> tuple[list[nn.Module], list[str]]:
    """The stages, those in the other form that have it, and what the others lack it for."""
    stages: list[nn.Module] = []
    left = []
    sizes = _sizes(model, [stage.downsample for stage in model.stages], size)
    for stage, map_size in zip(model.stages, sizes, strict=True):
        try:
            stages.append(ChannelsFirstStage(stage, map_size))
        except NoForm as reason:
            left.append(str(reason))
            stages.append(stage)
    return stages, left


def _tokens(model: IsotropicBackbone, size: InputSize | None) -> tuple[list[nn.Module], list[str]]:
    """All blocks as one stage, likewise."""
    map_size = None
    if size is not None:
        dtype = next(model.parameters()).dtype
        x = torch.zeros(1, model.in_chans, size.height, size.width, dtype=dtype)
        tokens, height, width = model.embed(x)
        map_size = MapSize(size.batch, tokens.shape[2], height, width, dtype)
    try:
        return [ChannelsFirstTokens(model.blocks, map_size)], []
    except NoForm as reason:
        return [model.blocks], [str(reason)]
