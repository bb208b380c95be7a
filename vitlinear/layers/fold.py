"""Folding for inference: of layer-scales here, of all else in the modules themselves.

Modules that can fold something have a method ``fuse`` that returns what replaces them; that is the
convention of `timm.models.reparameterize_model`, which calls them.
"""

from __future__ import annotations

import torch
from timm.layers import LayerScale
from timm.models import reparameterize_model
from torch import Tensor, nn

from .linear import Linear


def _times(parameter: Tensor, factor: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter * factor, parameter.requires_grad)


@torch.no_grad()
def fold_scale(linear: nn.Linear, scale: nn.Module) -> nn.Module:
    """Multiply the outputs of a linear layer by a layer-scale; returns what replaces the latter."""
    if isinstance(scale, LayerScale):
        # New ones: the memory of the old may be that of the caller's state dict.
        linear.weight = _times(linear.weight, scale.gamma[:, None])
        if linear.bias is not None:
            linear.bias = _times(linear.bias, scale.gamma)
    return nn.Identity()


def is_gelu(act: nn.Module) -> bool:
    """Whether this is the exact GELU."""
    return type(act) is nn.GELU and act.approximate == "none"


def fold_gelu(linear: Linear, act: nn.Module) -> nn.Module:
    """Make a GELU part of the linear layer before it; returns what replaces the former."""
    if not is_gelu(act):
        return act
    linear.activation = "gelu"
    return nn.Identity()


def fuse_model(model: nn.Module) -> None:
    """Fold all that can be folded in a model, in place; inference only, same outputs.

    On CPUs linear layers also keep a copy of their weights in a faster layout. A weight that is
    changed afterwards is copied anew, but not where nothing records the change: through ``.data``,
    through the vector of `torch.nn.utils.vector_to_parameters`, or from another process.

    Raises:
        ValueError: The model is in training mode, where batch norm has no fixed statistics.
    """
    if model.training:
        raise ValueError("only a model in eval mode can be fused: call model.eval() first")
    reparameterize_model(model, inplace=True)
