"""Faster ways of single steps, on CPUs and in inference; the one door to them.

Each function here stands for a plain formula of PyTorch, which it takes wherever a trick would not
help or not be allowed: on other devices, in exported programs, where autograd keeps what would be
written to. Callers write ``cpu.linear(x, weight)`` and know nothing of the reasons. What each trick
gains on whole models, and where, stands in docs/cpu.md; `benchmarks/cpu_paths.py` measures it.
"""

from .depthwise import depthwise_conv, identity_kernel, residual_depthwise_conv
from .feature_maps import elu_plus_one, split_signs
from .in_place import add_product, exp, own, times
from .products import linear, matmul
from .rotation import rotate_pairs
from .softmax import sdpa

__all__ = [
    "add_product",
    "depthwise_conv",
    "elu_plus_one",
    "exp",
    "identity_kernel",
    "linear",
    "matmul",
    "own",
    "residual_depthwise_conv",
    "rotate_pairs",
    "sdpa",
    "split_signs",
    "times",
]
