"""Folding for inference: of layer-scales and GELUs here, of all else in the modules themselves.

Modules that can fold something have a method ``fuse`` that returns what replaces them; that is the
convention of `timm.models.reparameterize_model`, which calls them too. They fold what is plain (see
`is_plain`), and leave the rest as it is. What is folded into a linear layer goes into a new one:
others may hold the old one, its tensors or the module around it, such as a second block.
"""

from __future__ import annotations

import copy
from typing import TypeGuard, TypeVar

import torch
from timm.layers import LayerScale
from torch import Tensor, nn

from .linear import Linear
from .plain import is_exact_gelu, is_plain

T = TypeVar("T", bound=nn.Module)


def _times(parameter: Tensor, factor: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter * factor, parameter.requires_grad)


def shared_copy(module: T) -> T:
    """The module anew, with the same parameters and buffers."""
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def is_product(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether this is a linear layer and no activation is part of it."""
    return is_plain(linear, nn.Linear) or (is_plain(linear, Linear) and linear.activation == "none")


@torch.no_grad()
def fold_scale(
    part: nn.Module, kind: type[nn.Module], ends: tuple[str, str], scale: nn.Module
) -> tuple[nn.Module, nn.Module]:
    """Make a layer-scale part of the linear layer that ends the module before it.

    Args:
        part: The module before it.
        kind: The class whose ``forward`` ends as ``ends`` says; nothing is folded into others.
        ends: Names of the linear layer in it and of the dropout that follows.
        scale: The layer-scale.

    Returns:
        What replaces part and scale: they themselves, if one of the four is not plain.
    """
    if not is_plain(part, kind) or not is_plain(scale, LayerScale):
        return part, scale
    linear, dropout = map(part.get_submodule, ends)
    if not is_product(linear) or not is_plain(dropout, nn.Dropout, nn.Identity):
        return part, scale
    scaled = shared_copy(linear)
    scaled.weight = _times(linear.weight, scale.gamma[:, None])
    if linear.bias is not None:
        scaled.bias = _times(linear.bias, scale.gamma)
    part = shared_copy(part)
    part.set_submodule(ends[0], scaled)
    return part, nn.Identity()


def fold_gelu(linear: nn.Module, act: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Make an exact GELU part of the linear layer before it.

    Returns:
        What replaces the two: they themselves, if one of them is not plain, or another activation.
    """
    if not is_exact_gelu(act) or not is_product(linear) or not is_plain(linear, Linear):
        return linear, act
    both = shared_copy(linear)
    both.activation = "gelu"
    return both, nn.Identity()


def _fuse_modules(module: nn.Module) -> None:
    """As `timm.models.reparameterize_model`, which asks the module where this asks its class.

    Wrappers answer for what they wrap, such as those of `torch.compile`, of checkpointing and of
    adapters: with what the module inside returns they would be lost.
    """
    for name, child in list(module.named_children()):
        fuse = getattr(type(child), "fuse", None)
        fused = child if fuse is None else fuse(child)
        if fused is not child:
            setattr(module, name, fused)
        _fuse_modules(fused)


def fuse_model(model: nn.Module) -> None:
    """Fold all that can be folded in a model, in place; inference only, same outputs.

    Modules that are not plain stay as they are: see `is_plain`. On CPUs linear layers also keep a
    copy of their weights in a faster layout, which follows a weight that changes.

    Raises:
        ValueError: The model is in training mode, where batch norm has no fixed statistics.
    """
    if model.training:
        raise ValueError("only a model in eval mode can be fused: call model.eval() first")
    _fuse_modules(model)
