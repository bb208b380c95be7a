"""Modules in a row, of which backward computes the cheap ones again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.checkpoint import checkpoint

from vitlinear.ops.recompute import recomputing
from vitlinear.ops.tracing import wants_common_operators

from .conv.depthwise_conv import DepthwiseConv, ResidualDepthwiseConv
from .hooks import has_forward_hooks
from .rms_norm import HeadRmsNorm, RmsNorm

# Cheap, and the same whenever they run on the same input.
_CHEAP = (nn.GELU, nn.SiLU, nn.LayerNorm, RmsNorm, HeadRmsNorm)
# Not their subclasses: those of quantisation observe what goes through them.
_CONVOLUTIONS = (nn.Conv2d, DepthwiseConv, ResidualDepthwiseConv)


def _can_run_again(module: nn.Module) -> bool:
    """Whether ``module.forward`` is cheap and gives what the module gave."""
    # A hook may change what goes in or comes out, a parametrization may be random.
    if has_forward_hooks(module) or is_parametrized(module):
        return False
    if type(module) in _CONVOLUTIONS:
        return module.groups == module.in_channels
    return isinstance(module, _CHEAP)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


class _Chain:
    """Modules in a row, run again from the input of the first, with the weights of this moment.

    The modules may have others by then: `torch.func.functional_call` lends them for a call.
    Backward asks for what comes out last first, and on the way to it makes all that it asks for
    next: that is held until then.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        # The last is not run again.
        self.modules = [(module, _tensors(module)) for module in modules[:-1]]
        self.made: dict[int, Tensor] = {}

    def run(self, count: int, x: Tensor) -> Tensor:
        """What comes out of the first ``count`` modules."""
        if count in self.made:
            return self.made.pop(count)
        for i, (module, held) in enumerate(self.modules[:count], 1):
            now = _tensors(module)
            if all(now.get(name) is value for name, value in held.items()):
                x = module.forward(x)
            else:
                x = functional_call(module, held, (x,))
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
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        for module in first:
            x = module(x)
        return last(x, *args)
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
