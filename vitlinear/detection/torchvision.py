"""Our models under torchvision's detectors: an FPN on their maps, and padding that does not count.

No `from __future__ import annotations`: TorchScript cannot read annotations that are strings.
"""

from collections.abc import Callable
from typing import Any

from timm.models import FeatureInfo
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from vitlinear.dense.backbone import MultiScaleBackbone
from vitlinear.errors import UserError


class BackboneWithFPN(nn.Module):
    """Maps of several scales, brought to one width by a feature pyramid network.

    What torchvision's detectors take for a backbone. TorchScript takes it if the body is a
    ``features_only`` model.

    Attributes:
        body: A `MultiScaleBackbone` or ``features_only`` model.
        fpn: A `torchvision.ops.FeaturePyramidNetwork`.
        out_channels: Channels of every map.
    """

    def __init__(self, body: nn.Module, fpn: FeaturePyramidNetwork, out_channels: int) -> None:
        super().__init__()
        self.body = body
        self.fpn = fpn
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images [B, in_chans, H, W] -> maps [B, out_channels, H_i, W_i], the finest first.

        Those of the body are called ``'0'``, ``'1'``, ...; torchvision's names for the others are
        ``'pool'``, or ``'p6'`` and ``'p7'``.
        """
        maps: dict[str, Tensor] = {}
        for i, x in enumerate(self.body(images)):
            maps[str(i)] = x
        return self.fpn(maps)


def fpn_backbone(
    model: str | nn.Module,
    out_channels: int = 256,
    extra_blocks: str | ExtraFPNBlock | None = "pool",
    norm_layer: Callable[..., nn.Module] | None = None,
    **backbone_args: Any,
) -> BackboneWithFPN:
    """A backbone for torchvision's RetinaNet, FCOS, Faster R-CNN and Mask R-CNN.

    For Faster and Mask R-CNN the default; for RetinaNet as published, three maps and two coarser
    ones: ``fpn_backbone(name, out_indices=(1, 2, 3), extra_blocks="p6p7")``. Their anchors are
    made for these five maps each.

    Args:
        model: Name of a model, a `MultiScaleBackbone`, or what timm makes with
            ``features_only=True``, if its maps have strides that double (models of one resolution
            get a pyramid by their name).
        out_channels: Channels of every map.
        extra_blocks: ``'pool'`` for a coarser map by subsampling, ``'p6p7'`` for two by
            convolutions on the coarsest map of the model, a block of torchvision's, or None.
        norm_layer: Norm in the FPN, given the channels; none by default.
        **backbone_args: For `MultiScaleBackbone`, if model is a name: ``out_indices``,
            ``out_norms``, ``frozen_stages``, ``pretrained``, ...

    Raises:
        UserError: There is no such model or block, or the strides do not double.
    """
    if isinstance(model, str):
        body: Any = MultiScaleBackbone(model, **backbone_args)
    elif backbone_args:
        raise UserError(f"{', '.join(backbone_args)}: only for a model that is given by its name")
    else:
        body = model
    channels, reductions = _levels(body)
    if any(2 * fine != coarse for fine, coarse in zip(reductions, reductions[1:], strict=False)):
        raise UserError(
            f"an FPN needs maps whose strides double, not {reductions}: give out_indices; a model "
            "of one resolution gets a pyramid if it is given by its name"
        )
    if extra_blocks == "pool":
        extra_blocks = LastLevelMaxPool()
    elif extra_blocks == "p6p7":
        extra_blocks = LastLevelP6P7(channels[-1], out_channels)
    elif isinstance(extra_blocks, str):
        raise UserError(f"extra_blocks must be 'pool', 'p6p7' or None, got {extra_blocks!r}")
    fpn = FeaturePyramidNetwork(channels, out_channels, extra_blocks, norm_layer)
    return BackboneWithFPN(body, fpn, out_channels)


def _levels(body: nn.Module) -> tuple[list[int], list[int]]:
    """Channels and strides of the maps."""
    if isinstance(body, MultiScaleBackbone):
        return list(body.channels), list(body.reductions)
    info = getattr(body, "feature_info", None)
    if not isinstance(info, FeatureInfo):
        raise UserError(
            f"{type(body).__name__} gives no maps: make it with features_only=True, or give its "
            "name"
        )
    return info.channels(), info.reduction()
