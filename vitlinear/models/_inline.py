"""Configuration that the hosts of InLine attention share.

InLine (`Bridging the Divide: Reconsidering Softmax and Linear Attention`, NeurIPS 2024)
- paper: https://arxiv.org/abs/2412.06590
- code and weights by the authors: https://github.com/LeapLabTHU/InLine
"""

from typing import Any

from ._stages import map_cfg

# Of every host; evaluation squeezes images into a square before the crop, as published.
INLINE = {
    "crop_mode": "squash",
    "paper_ids": "arXiv:2412.06590",
    "paper_name": "Bridging the Divide: Reconsidering Softmax and Linear Attention",
    "origin_url": "https://github.com/LeapLabTHU/InLine",
}


def inline_cfg(side: int = 224, **kwargs: Any) -> dict[str, Any]:
    """A ``pretrained_cfg`` of a host of four stages, for square images of this side."""
    return map_cfg(side, first_conv="stem.conv", **INLINE, **kwargs)
