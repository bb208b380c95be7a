"""What only matters when training starts from weights: freezing, and the size of a new head."""

import types
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

import vitlinear  # noqa: F401  registers the models with timm
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


def initialise_head(model: nn.Module, scale: float | None, bias: float | None) -> None:
    """Scales the weights of the classifier, and sets its bias, in place.

    Args:
        model: With timm's ``get_classifier``.
        scale: Factor, or None. Small ones keep a new head from disturbing trained features.
        bias: Value, or None. Negative ones start a sigmoid loss at few positives.

    Raises:
        UserError: The classifier has no weights, or no bias.
    """
    if scale is None and bias is None:
        return
    classifier = model.get_classifier()  # type: ignore[operator]
    layers = [part for part in classifier.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    if not layers:
        raise UserError("--head-init-scale and --head-init-bias: the model has no classifier")
    with torch.no_grad():
        for layer in layers:
            if scale is not None:
                layer.weight.mul_(scale)
            if bias is not None:
                if layer.bias is None:
                    raise UserError("--head-init-bias: the classifier has no bias")
                layer.bias.fill_(bias)


def enable_checkpointing(model: nn.Module, name: str) -> None:
    """Turns gradient checkpointing on, or says that the model has none."""
    try:
        model.set_grad_checkpointing(enable=True)  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:
        raise UserError(
            f"{name} has no gradient checkpointing: drop --grad-checkpointing"
        ) from error
