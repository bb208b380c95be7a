"""Questions about the program that is being made of the code that runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

# Looked up once: these are asked in every call of an attention.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_dispatch_mode = torch._C._get_dispatch_mode
_PROGRAM_MODES = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE
_function_modes = torch._C._len_torch_function_stack
_is_tracing = torch._C._is_tracing
_transforms = torch._C._are_functorch_transforms_active
_stands_for_many = torch._C._functorch.is_legacy_batchedtensor

# Types of the tensors of a plain call; others see more than their values.
PLAIN = frozenset({Tensor, torch.nn.Parameter})


@torch.compiler.assume_constant_result
def under_transforms() -> bool:
    """Whether transforms of `torch.func` are at work, such as vmap."""
    return bool(_transforms())


@torch.compiler.assume_constant_result
def wants_common_operators() -> bool:
    """Whether operators must be common ones: programs for other places, transformed functions.

    So must those that a mode notes. Evaluated when Dynamo traces, which by itself would take every
    program for an exported one.
    """
    return (
        torch.compiler.is_exporting()
        or _is_tracing()
        or _transforms()
        or forward_ad._current_level >= 0
        or notes_operators()
    )


def takes_functions() -> bool:
    """Whether a derivative of our own can be kept: by autograd, and no program is made."""
    return (
        torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
    )


def keeps_nothing() -> bool:
    """Whether a new tensor may be written to again: no gradient wants it, nobody traces."""
    return not (
        torch.is_grad_enabled() or torch.compiler.is_compiling() or wants_common_operators()
    )


def stands_for_many(grad: Tensor) -> bool:
    """Whether a gradient is a batch of gradients: ``torch.autograd.grad(is_grads_batched=True)``.

    That is a transformation of its own, which knows common operators alone.
    """
    if torch.compiler.is_compiling():
        return False
    return _stands_for_many(grad)


def notes_operators() -> bool:
    """Whether a mode makes a program of the operators that run, or runs them on fake tensors."""
    return _dispatch_modes() > 0 and any(_dispatch_mode(key) is not None for key in _PROGRAM_MODES)


def under_a_mode() -> bool:
    """Whether something looks on at every operator: fake tensors, counters, tracers."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_watched(grad: Tensor | None = None) -> bool:
    """Whether somebody looks at each operator that runs: a compiler, a transform, a mode.

    Args:
        grad: In a backward pass, a gradient that it was given.
    """
    return torch.compiler.is_compiling() or is_looked_at(grad)


def _only_a_default_device() -> bool:
    """Whether the modes over functions are those of `torch.set_default_device` alone."""
    modes = map(torch._C._get_function_stack_at, range(_function_modes()))
    return all(isinstance(mode, DeviceContext) for mode in modes)


def is_looked_at(grad: Tensor | None = None) -> bool:
    """`is_watched` of what is not being compiled: the questions above, without as many calls."""
    return (
        _dispatch_modes() > 0
        or (_function_modes() > 0 and not _only_a_default_device())
        or _is_tracing()
        or _transforms()
        or forward_ad._current_level >= 0
        or torch.compiler.is_exporting()
        or (grad is not None and _stands_for_many(grad))
    )
