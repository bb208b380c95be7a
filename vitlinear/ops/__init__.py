"""Attention as functions on tensors. Knows nothing of modules, models or timm."""

from .attention import linear_attention, softmax_attention
from .attention_state import LinearAttentionState
from .backend import BACKENDS, Choice, KernelError, choose_backend
from .mechanisms import MECHANISMS, Mechanism, get_mechanism
from .precision import accumulation_dtype
from .rotary import (
    RotaryTables,
    full_width_rotary_tables,
    lrpe_tables,
    rotary_tables,
    table_dtype,
)
from .states import linear_attention_state, read_linear_attention_state
from .workload import Workload

__all__ = [
    "BACKENDS",
    "MECHANISMS",
    "Choice",
    "KernelError",
    "LinearAttentionState",
    "Mechanism",
    "RotaryTables",
    "Workload",
    "accumulation_dtype",
    "choose_backend",
    "full_width_rotary_tables",
    "get_mechanism",
    "linear_attention",
    "linear_attention_state",
    "lrpe_tables",
    "read_linear_attention_state",
    "rotary_tables",
    "softmax_attention",
    "table_dtype",
]
