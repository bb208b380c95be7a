"""Models as programs whose maps are [B, C, H, W] throughout, for what runs exported programs.

In PyTorch maps are channels-last, and heads are views of one projection. Runtimes of ONNX know no
views: there each becomes a copy. `rewrite` makes the same model of steps that need few.
"""

from .rewrite import CHANNELS_FIRST, CHANNELS_LAST, InputSize, Rewritten, is_rewritable, rewrite
from .runtimes import ONNXRUNTIME, OPENVINO, RUNTIMES, pays

__all__ = [
    "CHANNELS_FIRST",
    "CHANNELS_LAST",
    "ONNXRUNTIME",
    "OPENVINO",
    "RUNTIMES",
    "InputSize",
    "Rewritten",
    "is_rewritable",
    "pays",
    "rewrite",
]
