"""Backbones registered with timm; one family per file."""

from .mavit import MAViT
from .nalaformer import NaLaFormer
from .ravlt import RAVLT

__all__ = [
    "RAVLT",
    "MAViT",
    "NaLaFormer",
]
