"""The question before every shortcut: does a module do what its class says, and no more?

Whoever trains, adapts or looks into a model puts other modules in the place of ours, and hooks,
other weights or another ``forward`` into those that stay. A shortcut, which folds a module into its
neighbour or runs it again, knows a few classes as they are written. It asks here first, and leaves
alone what is not plain.
"""

from __future__ import annotations

from typing import TypeGuard, TypeVar

import torch.nn.modules.module as torch_module
from torch import Tensor, nn

T = TypeVar("T", bound=nn.Module)


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether forward hooks run when this module is called, its own or those of all modules."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
    )


def does_nothing(dropout: nn.Module) -> bool:
    """Whether this is a dropout that drops nothing, and whose call nobody waits for."""
    return type(dropout) is nn.Dropout and dropout.p == 0 and not has_forward_hooks(dropout)


def is_exact_gelu(module: nn.Module) -> bool:
    """Whether a module is a plain GELU, and not an approximation of it."""
    return is_plain(module, nn.GELU) and module.approximate == "none"


def _has_backward_hooks(module: nn.Module) -> bool:
    return bool(
        module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def is_plain(module: nn.Module, *kinds: type[T]) -> TypeGuard[T]:
    """Whether a module is of exactly one of these classes, and nothing was done to it.

    Not plain are subclasses, to which parametrizations turn a module too; hooks; a ``forward`` of
    the module's own; weights that are remade for each call, as pruning, `weight_norm` and
    `spectral_norm` of the old style keep them; and weights of a type of their own, such as
    quantised ones. The modules inside are not asked.

    Args:
        module: The module.
        kinds: The classes.
    """
    return (
        type(module) in kinds
        and not has_forward_hooks(module)
        and not _has_backward_hooks(module)
        and "forward" not in module.__dict__
        and all(type(x) in (Tensor, nn.Parameter, type(None)) for x in module._parameters.values())
        and not any(isinstance(value, Tensor) for value in module.__dict__.values())
    )
