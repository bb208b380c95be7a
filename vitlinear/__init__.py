"""Vision backbones with linear attention.

Importing the package registers every model with timm::

    import timm, vitlinear
    model = timm.create_model("ravlt_s")
"""

from vitlinear import models as models
from vitlinear.report import backend_report

__all__ = ["backend_report"]

__version__ = "0.1.0"
