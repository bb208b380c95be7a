"""mmdet's data preprocessor, which also tells the backbone how much of each image is padding."""

from __future__ import annotations

from typing import Any

from .packages import require
from .valid_sizes import with_valid_sizes

(_models,) = require("mmdet.models.data_preprocessors")


class DetDataPreprocessor(_models.DetDataPreprocessor):
    """mmdet's ``DetDataPreprocessor``; its batches know the valid size of each image.

    That is the size after the pipeline and before the batch was padded. What a pipeline's own
    ``Pad`` adds counts as image, as it does for mmdet. Takes the arguments of mmdet's class.
    """

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Batch as mmdet's class gives it, valid sizes attached (`vitlinear.dense.padding`)."""
        return with_valid_sizes(super().forward(data, training), data["inputs"])
