"""The one step that makes a model of layers on maps [B, C, H, W], stage by stage."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from vitlinear.layers import is_plain
from vitlinear.models._stages import StagedBackbone

from .blocks import ChannelsFirstStage
from .layers import AffineChannelNorm, NoForm
from .positions import MapAngles

CHANNELS_FIRST, CHANNELS_LAST = "channels-first", "channels-last"


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


def _fix_positions(model: nn.Module, example: Tensor) -> None:
    """Make position tables constants: every input will be of this size, but for the batch."""
    makers = [module for module in model.modules() if isinstance(module, MapAngles)]
    hooks = [
        maker.register_forward_pre_hook(lambda maker, inputs: maker.fix(*inputs))
        for maker in makers
    ]
    try:
        model(example)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def rewrite(model: nn.Module, example: Tensor | None = None) -> tuple[nn.Module, Rewritten]:
    """Make the same model with as many stages on maps [B, C, H, W] as have that form.

    What is made is fused. Its outputs are those of the model, but for roundings. Its parameters
    have other names, orders and shapes, which no checkpoint fits.

    Args:
        model: In eval mode; stays as it is.
        example: An input with the height and width of all that will come; None where they differ.

    Returns:
        The model that was made, or the same one if no stage has the form; and what was rewritten.

    Raises:
        ValueError: The model is in training mode.
    """
    if not isinstance(model, StagedBackbone):
        return model, Rewritten(0, 1, (type(model).__name__,))
    made = copy.deepcopy(model)
    made.fuse()
    left: dict[str, None] = {}
    stages: list[nn.Module] = []
    for stage in made.stages:
        try:
            stages.append(ChannelsFirstStage(stage))
        except NoForm as reason:
            left[str(reason)] = None
            stages.append(stage)
    done = sum(isinstance(stage, ChannelsFirstStage) for stage in stages)
    rewritten = Rewritten(done, len(stages), tuple(left))
    if not done:
        return model, rewritten
    made.stages = nn.Sequential(*stages)
    for module in list(made.modules()):
        for name, child in module.named_children():
            if is_plain(child, LayerNorm2d):
                setattr(module, name, AffineChannelNorm(child))
    if example is not None:
        _fix_positions(made, example)
    return made, rewritten
