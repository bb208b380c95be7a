"""Fused kernels for the attention operator, forward and backward. The one place with triton in it.

Imported when a kernel is to run, never by `import vitlinear`.
"""

from .blocks import INTERPRETING
from .launch import backward, forward, with_shapes
from .state_launch import read_backward, read_forward, state_backward, state_forward

__all__ = [
    "INTERPRETING",
    "backward",
    "forward",
    "read_backward",
    "read_forward",
    "state_backward",
    "state_forward",
    "with_shapes",
]
