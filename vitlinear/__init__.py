"""Vision backbones with linear attention.

Importing the package registers every model with timm::

    import timm, vitlinear
    model = timm.create_model("ravlt_s")
    mine = vitlinear.load("output/run/best.safetensors")  # as it was trained
"""

from vitlinear import models as models
from vitlinear.checkpoints.load import load
from vitlinear.replacement import replace_attention
from vitlinear.report import backend_report
from vitlinear.streaming import stream

__all__ = ["backend_report", "load", "replace_attention", "stream"]

__version__ = "0.1.0"
