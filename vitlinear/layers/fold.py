"""Folding for inference: batch norm into convolutions, layer-scales into projections.

Modules that can fold something have a method ``fuse`` that returns what replaces them; that is the
convention of `timm.models.reparameterize_model`, which calls them.
"""

from __future__ import annotations

import timm.layers
import torch
from timm.layers import LayerScale
from timm.models import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class ConvNormAct(timm.layers.ConvNormAct):
    """timm's convolution, batch norm and activation, which can become one convolution."""

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Convolution with the statistics of the batch norm inside, then the activation."""
        conv = fuse_conv_bn_eval(self.conv, self.bn)
        if isinstance(self.bn.act, nn.Identity):
            return conv
        return nn.Sequential(conv, self.bn.act)


@torch.no_grad()
def fold_scale(linear: nn.Linear, scale: nn.Module) -> nn.Module:
    """Multiply the outputs of a linear layer by a layer-scale; returns what replaces the latter."""
    if isinstance(scale, LayerScale):
        linear.weight.mul_(scale.gamma[:, None])
        if linear.bias is not None:
            linear.bias.mul_(scale.gamma)
    return nn.Identity()


def fuse_model(model: nn.Module) -> None:
    """Fold all that can be folded in a model, in place; inference only, same outputs.

    Raises:
        ValueError: The model is in training mode, where batch norm has no fixed statistics.
    """
    if model.training:
        raise ValueError("only a model in eval mode can be fused: call model.eval() first")
    reparameterize_model(model, inplace=True)
