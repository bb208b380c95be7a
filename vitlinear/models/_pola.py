"""Configuration that the hosts of PolaFormer's attention share.

`PolaFormer: Polarity-aware Linear Attention for Vision Transformers` (ICLR 2025)
- paper: https://arxiv.org/abs/2501.15061
- code and weights by the authors: https://github.com/ZacharyMeng/PolaFormer
"""

from typing import Any

from ._stages import map_cfg

POLA = {
    "paper_ids": "arXiv:2501.15061",
    "paper_name": "PolaFormer: Polarity-aware Linear Attention for Vision Transformers",
    "origin_url": "https://github.com/ZacharyMeng/PolaFormer",
}


def pola_cfg(side: int = 224, **kwargs: Any) -> dict[str, Any]:
    """A ``pretrained_cfg`` of a host of four stages, for square images of this side."""
    return map_cfg(side, first_conv="stem.conv", **POLA, **kwargs)
