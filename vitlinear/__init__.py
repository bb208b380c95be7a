"""Vision backbones with linear attention.

Importing the package registers every model with timm::

    import timm, vitlinear
    model = timm.create_model("ravlt_s")
    mine = vitlinear.load("output/run/best.safetensors")  # as it was trained
"""

import importlib
from typing import Any

from vitlinear import models as models
from vitlinear.checkpoints.load import load
from vitlinear.report import backend_report
from vitlinear.streaming import stream

__all__ = ["backend_report", "load", "parallel", "stream"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`vitlinear.parallel`, loaded when it is asked for, and what it needs of torch with it."""
    if name == "parallel":
        return importlib.import_module("vitlinear.parallel")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
