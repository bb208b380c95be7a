"""Attentions of the registry in models of timm's.

Not to be taken for `vitlinear.convert`, which brings authors' checkpoints under our names.
"""

from . import rebuild as rebuild
from .kinds import PARTS
from .replace import ARCHITECTURE, replace_attention
from .report import Replacement, ReplacementReport

__all__ = ["ARCHITECTURE", "PARTS", "Replacement", "ReplacementReport", "replace_attention"]
