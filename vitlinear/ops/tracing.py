"""What kind of program is being made of the code that runs."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


@torch.compiler.assume_constant_result
def wants_common_operators() -> bool:
    """Whether operators must be common ones: programs for other places, transformed functions.

    Evaluated when Dynamo traces, which by itself would take every program for an exported one.
    """
    return (
        torch.compiler.is_exporting()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
