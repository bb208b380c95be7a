"""PyTorch's own layers in the place of ours, for tools that ask for a layer's very class.

Such as `torch.ao.quantization.quantize_dynamic`, and counters that have a table of classes: a
subclass is another class to them, and they pass it over without a word.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from .conv.dynamic_conv import TokenConv
from .linear import Linear
from .plain import is_plain

M = TypeVar("M", bound=nn.Module)


def _pytorch_layer(layer: nn.Module) -> nn.Module:
    """PyTorch's layer with the same parameters; the layer itself, if not ours or not plain.

    Raises:
        ValueError: An activation is part of the layer.
    """
    made: nn.Linear | nn.Conv1d
    if is_plain(layer, Linear):
        if layer.activation != "none":
            raise ValueError(
                "PyTorch has no layers like those of a fused model: "
                "call use_pytorch_layers before fuse()"
            )
        made = nn.Linear(layer.in_features, layer.out_features, device="meta")
        made.weight, made.bias = layer.weight, layer.bias
    elif is_plain(layer, TokenConv):
        made = nn.Conv1d(
            layer.in_channels, layer.out_channels, 1, groups=layer.groups, device="meta"
        )
        made.weight, made.bias = layer.weight, layer.bias
    else:
        return layer
    return made.train(layer.training)


@torch.no_grad()
def use_pytorch_layers(model: M) -> M:
    """Replace our subclasses of `nn.Linear` and `nn.Conv1d` by these themselves, in place.

    Parameters, their names and outputs stay the same; on CPUs `Linear` is faster. Layers with hooks
    or other weights stay, and so do `DepthwiseConv` and `CeilConv`, which compute something else
    than their parent.

    Args:
        model: Our model, or one with parts of it.

    Returns:
        The model.

    Raises:
        ValueError: The model is fused.
    """
    layers = (child for module in model.modules() for child in module.children())
    made = {layer: _pytorch_layer(layer) for layer in layers}  # all, before any is replaced
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = made[child]
    return model
