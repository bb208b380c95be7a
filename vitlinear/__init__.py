"""Vision backbones with linear attention.

Importing the package registers every model with timm::

    import timm, vitlinear
    model = timm.create_model("ravlt_s")
    mine = vitlinear.load("output/run/best.safetensors")  # as it was trained
    layer = vitlinear.create_attention("mala", dim=192, num_heads=3)
    report = vitlinear.replace_attention(timm.create_model("vit_small_patch16_224"), "mala", "6:")
"""

import importlib
from typing import Any

from vitlinear import models as models
from vitlinear.checkpoints.load import load
from vitlinear.mixers import create_attention, describe_attention, list_attentions
from vitlinear.replacement import replace_attention
from vitlinear.report import backend_report
from vitlinear.streaming import stream

__all__ = [
    "backend_report",
    "create_attention",
    "describe_attention",
    "list_attentions",
    "load",
    "parallel",
    "replace_attention",
    "stream",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`vitlinear.parallel`, loaded when it is asked for, and what it needs of torch with it."""
    if name == "parallel":
        return importlib.import_module("vitlinear.parallel")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
