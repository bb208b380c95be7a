"""The head of a segmentor, for `vitlinear.stream`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitlinear.errors import UserError
from vitlinear.streaming import Head

from .backbone import MultiScaleBackbone


class _Decoder(nn.Module):
    """A segmentor without the model of its backbone."""

    def __init__(self, segmentor: Any) -> None:
        super().__init__()
        self.pyramid = segmentor.backbone.pyramid
        self.norms = segmentor.backbone.norms
        self.neck = getattr(segmentor, "neck", None)
        self.decode_head = segmentor.decode_head
        self.train(segmentor.training)

    def forward(self, maps: Any) -> Tensor:
        """The maps of the model -> logits [1, K, h, w]."""
        if self.pyramid is not None:
            maps = self.pyramid(maps)
        if self.norms:
            maps = [norm(x) for norm, x in zip(self.norms.values(), maps, strict=True)]
        if self.neck is not None:
            maps = self.neck(maps)
        return self.decode_head(maps)


def segmentor_head(segmentor: nn.Module) -> Head:
    """The logits of a segmentor, at the size of its finest map, as an output of `vitlinear.stream`.

    The model to be streamed is ``segmentor.backbone.model``.

    Args:
        segmentor: Of mmsegmentation, or whatever has a ``backbone`` and a ``decode_head``.

    Raises:
        UserError: Its backbone is not a `MultiScaleBackbone`.
    """
    backbone = getattr(segmentor, "backbone", None)
    if not isinstance(backbone, MultiScaleBackbone):
        raise UserError(
            f"the backbone of the segmentor is {type(backbone).__name__}: a MultiScaleBackbone is "
            "needed"
        )
    indices = tuple(backbone.indices)
    of: Any = indices[0] if backbone.pyramid is not None else indices
    return Head(_Decoder(segmentor), of)
