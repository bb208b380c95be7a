"""Attention as functions on tensors. Knows nothing of modules, models or timm."""

from .attention import linear_attention, softmax_attention
from .backend import BACKENDS, Choice, KernelError, Workload, choose_backend
from .eager import accumulation_dtype
from .mechanisms import MECHANISMS, Mechanism, get_mechanism
from .rotary import RotaryTables, full_width_rotary_tables, lrpe_tables, rotary_tables

__all__ = [
    "BACKENDS",
    "MECHANISMS",
    "Choice",
    "KernelError",
    "Mechanism",
    "RotaryTables",
    "Workload",
    "accumulation_dtype",
    "choose_backend",
    "full_width_rotary_tables",
    "get_mechanism",
    "linear_attention",
    "lrpe_tables",
    "rotary_tables",
    "softmax_attention",
]
