"""Fused kernels for the attention operator, forward and backward. The one place with triton in it.

Imported when a kernel is to run, never by `import vitlinear`.
"""

from .blocks import INTERPRETING
from .launch import backward, forward

__all__ = ["INTERPRETING", "backward", "forward"]
