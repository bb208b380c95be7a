"""Modules in a row, of which backward computes the cheap ones again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops.recompute import recomputing
from ..ops.tracing import wants_common_operators
from .rms_norm import HeadRmsNorm, RmsNorm

# Cheap, and the same whenever they run on the same input.
_CHEAP = (nn.GELU, nn.SiLU, nn.LayerNorm, RmsNorm, HeadRmsNorm)


def _can_run_again(module: nn.Module) -> bool:
    """Whether ``module.forward`` is cheap and gives what the module gave."""
    everywhere = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    if everywhere or module._forward_hooks or module._forward_pre_hooks:
        return False  # a hook may change what goes in or comes out
    depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels
    return depthwise or isinstance(module, _CHEAP)


class _Chain:
    """Modules in a row, run again from the input of the first.

    Backward asks for what comes out last first, and on the way to it makes all that it asks for
    next: that is held until then.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.made: dict[int, Tensor] = {}

    def run(self, count: int, x: Tensor) -> Tensor:
        """What comes out of the first ``count`` modules."""
        if count in self.made:
            return self.made.pop(count)
        for i, module in enumerate(self.modules[:count], 1):
            x = module.forward(x)
            if i < count:
                self.made[i] = x
        return x


def _compiles_for_training() -> bool:
    """Whether a compiler looks that makes a backward pass as well, and for this place."""
    return (
        torch.compiler.is_compiling() and torch.is_grad_enabled() and not wants_common_operators()
    )


def _compute_twice(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Modules in a row, all marked for the compiler to run again in backward."""

    def run(x: Tensor) -> Tensor:
        for module in modules:
            x = module(x)
        return x

    y: Tensor = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
    return y


def run_recomputing(modules: Sequence[nn.Module], x: Tensor, *args: Any) -> Tensor:
    """``modules[-1](...modules[1](modules[0](x)), *args)``, keeping less for backward.

    What comes out of all but the last is not kept for the sake of the next one: backward makes it
    again from x, with autograd's own formulas for the rest. Cheap modules only: activations,
    norms, depthwise convolutions. From the first on that is none of those, or has forward hooks,
    autograd keeps what it always keeps. See `vitlinear.ops.recompute`. A compiler, which by itself
    keeps more here than eager mode does, is told the same if it holds for all but the last.

    Args:
        modules: At least two.
        x: Input of the first, which keeps it anyway.
        args: Further arguments of the last.
    """
    *first, last = modules
    if _compiles_for_training() and all(map(_can_run_again, first)):
        return last(_compute_twice(first, x), *args)
    y = modules[0](x)
    cheap = _can_run_again(modules[0])
    chain = _Chain(modules)
    for i, module in enumerate(modules[1:], 1):
        rest = args if i == len(modules) - 1 else ()
        if cheap:
            with recomputing(y, partial(chain.run, i), x):
                y = module(y, *rest)
            cheap = _can_run_again(module)
        else:
            y = module(y, *rest)
    return y
