"""Parts of a model that are not trained."""

import types
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from vitlinear.errors import UserError, did_you_mean


def freeze(model: nn.Module, patterns: Sequence[str]) -> int:
    """Freezes parameters, and keeps modules that are frozen whole in eval mode.

    Such modules drop nothing and leave their running statistics as they are, whatever ``train()``
    is called on; so do those of a deep copy.

    Args:
        model: Changed in place.
        patterns: Names of parameters or modules (``stem``, ``stages.0``), or globs of them
            (``*.bias``, ``stages.[01].blocks.*``). A module's name stands for all inside.

    Returns:
        The number of frozen values.

    Raises:
        UserError: A pattern matches nothing, or no parameter is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            known = sorted({prefix for name in names for prefix in _prefixes(name)})
            raise UserError(
                f"--freeze {pattern} matches no parameter of the model"
                f"{did_you_mean(pattern, known)}; its parts are "
                f"{', '.join(dict.fromkeys(name.split('.')[0] for name in names))}"
            )
    frozen = 0
    for name, parameter in model.named_parameters():
        if any(_matches(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
            frozen += parameter.numel()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            # a bound method: a deep copy (the average of the weights) gets one bound to itself
            module.train = types.MethodType(_stay_in_eval, module)  # type: ignore[method-assign]
            module.eval()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"--freeze {' '.join(patterns)} leaves nothing to train")
    return frozen


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _stay_in_eval(self: nn.Module, mode: bool = True) -> Any:
    """Takes the place of ``train`` in a frozen module."""
    return type(self).train(self, False)
