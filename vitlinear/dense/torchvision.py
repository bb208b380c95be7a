"""Our models under torchvision's detectors: an FPN on their maps, and padding that does not count.

No `from __future__ import annotations`: TorchScript cannot read annotations that are strings.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from timm.models import FeatureInfo
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from vitlinear.errors import UserError
from vitlinear.models._valid_region import ValidRegion, use_valid_region, valid_region

from .backbone import MultiScaleBackbone
from .padding import attach_valid_sizes, padding, valid_sizes_of, zero_map


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
        if torch.jit.is_scripting():
            return self.levels(images)
        with padding(self, images.shape[-2:], valid_sizes_of(images)):
            maps, region = self.levels(images), valid_region()
        if region is not None:
            maps = {name: repeat_edges(x, region) for name, x in maps.items()}
            for x in maps.values():
                x.valid_region = region  # type: ignore[attr-defined]
        return maps

    def levels(self, images: Tensor) -> dict[str, Tensor]:
        """Maps of the pyramid by name, of images without padding."""
        maps: dict[str, Tensor] = {}
        for i, x in enumerate(self.body(images)):
            maps[str(i)] = x
        return self.fpn(maps)


def repeat_edges(x: Tensor, region: ValidRegion) -> Tensor:
    """Fill the padding of a map [B, C, H, W] as RoI pooling takes what lies outside of a map."""
    sizes = torch.tensor(region.map_sizes(x.shape[2], x.shape[3])).to(x.device, non_blocking=True)
    images = torch.arange(x.shape[0], device=x.device)
    rows = torch.arange(x.shape[2], device=x.device).minimum(sizes[:, :1] - 1)
    cols = torch.arange(x.shape[3], device=x.device).minimum(sizes[:, 1:] - 1)
    filled = x[images[:, None, None], :, rows[:, :, None], cols[:, None, :]]
    return filled.permute(0, 3, 1, 2)


def mask_padding(detector: nn.Module) -> nn.Module:
    """Let a detector find in each image of a batch what it would find in that image alone.

    Padding is then kept out of the backbone, its FPN, RoI pooling, and the convolutions of the RPN
    or of the heads of RetinaNet and FCOS, which propose nothing there when they predict. Without
    this, padding is black image to a detector, as it is with torchvision's own backbones.

    What remains different: batch norms in training, group norms (FCOS has them in its heads), and
    the losses count padding; RoI pooling of boxes at the edge of an image that are thinner than
    one place of their map; P6 and P7 of InLine-PVT and Pola-PVT, which round down, may end a place
    earlier.

    Args:
        detector: One of torchvision's, on an `fpn_backbone`. It gets hooks, which TorchScript does
            not take; its transform may be one of your own, which pads to the right and below. A
            second call changes nothing; threads may share it.

    Returns:
        The same detector.

    Raises:
        UserError: It is no detector of torchvision's, or its backbone is another: padding would
            count as before.
    """
    transform, backbone = (getattr(detector, name, None) for name in ("transform", "backbone"))
    if not isinstance(transform, nn.Module) or not isinstance(backbone, nn.Module):
        raise UserError(
            "mask_padding takes a detector of torchvision's, such as RetinaNet or FasterRCNN: "
            f"{type(detector).__name__} lacks its transform or backbone"
        )
    if not any(isinstance(module, BackboneWithFPN) for module in backbone.modules()):
        raise UserError(
            f"mask_padding does nothing for a backbone that is a {type(backbone).__name__}, which "
            "takes padding for image: build the detector on fpn_backbone(...)"
        )
    if _attach_sizes not in transform._forward_hooks.values():
        transform.register_forward_hook(_attach_sizes)
    dense: Any = getattr(detector, "rpn", detector)
    if dense is not detector:  # an RPN would fill up with proposals of no score at all
        dense.score_thresh = max(dense.score_thresh, 1e-7)
    head = dense.head
    if _enter_region in head._forward_pre_hooks.values():
        return detector
    head.register_forward_pre_hook(_enter_region)
    head.register_forward_hook(_leave_region, always_call=True)
    for name, module in head.named_modules():
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1:
            module.register_forward_pre_hook(zero_map, with_kwargs=True)
        if name.endswith("cls_logits"):
            module.register_forward_hook(_propose_nothing)
    return detector


def _attach_sizes(transform: nn.Module, args: Any, output: tuple[ImageList, Any]) -> None:
    """Note on a batch, however the transform made it, the valid size of each image."""
    batch, _ = output
    attach_valid_sizes(batch.tensors, batch.image_sizes)


class _Entered(threading.local):
    """The heads that this thread's forward pass is in, each with the context that it entered."""

    def __init__(self) -> None:
        self.heads: list[tuple[nn.Module, AbstractContextManager[None]]] = []


_entered = _Entered()


def _enter_region(head: nn.Module, args: tuple[list[Tensor]]) -> None:
    context = use_valid_region(getattr(args[0][0], "valid_region", None))
    context.__enter__()
    _entered.heads.append((head, context))


def _leave_region(head: nn.Module, args: Any, output: Any) -> None:
    # Not there if another hook failed before the region was entered.
    if _entered.heads and _entered.heads[-1][0] is head:
        _entered.heads.pop()[1].__exit__(None, None, None)


def _propose_nothing(layer: nn.Module, args: Any, logits: Tensor) -> Tensor:
    """In padding, by scores of zero; but in training, where they would be far from the truth."""
    region = valid_region()
    if region is None or layer.training:
        return logits
    mask = region.mask(logits.shape[2], logits.shape[3], logits.device)
    return logits.masked_fill(mask.unsqueeze(1), -torch.inf)


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
