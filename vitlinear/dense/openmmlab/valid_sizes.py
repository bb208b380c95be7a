"""Valid sizes of padded images, for the data preprocessors of mmdet and mmseg."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..padding import attach_valid_sizes


def with_valid_sizes(data: dict[str, Any], images: Iterable[Tensor]) -> dict[str, Any]:
    """Attach the valid size of each image to a batch.

    Args:
        data: What a data preprocessor gives: ``inputs`` [B, C, H, W], padded to the right and
            below, and ``data_samples``, or None.
        images: [C, H_i, W_i] each, before they were padded.

    Returns:
        The same. Sizes are the samples' ``img_shape``, which what resizes a whole batch keeps in
        step with it; without samples, those of the images.
    """
    samples = data["data_samples"]
    if samples is None:
        sizes = [tuple(image.shape[-2:]) for image in images]
    else:
        sizes = [tuple(sample.img_shape[:2]) for sample in samples]
    attach_valid_sizes(data["inputs"], sizes)
    return data
