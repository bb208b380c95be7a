"""Models as files that run elsewhere: ONNX, torch.export programs, safetensors."""

from .shapes import Shapes
from .write import FORMATS, export

__all__ = ["FORMATS", "Shapes", "export"]
