"""Backbones registered with timm; one family per file."""

from .ravlt import RAVLT

__all__ = ["RAVLT"]
