"""The models of this package, asked of timm's registry, and what it takes to describe one."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

PACKAGE = "vitlinear.models."


def our_models(tests: bool = True) -> list[str]:
    """Names of the models that this package registers, in timm's natural order.

    Args:
        tests: Also those for tests and small data, ``test_*``.
    """
    return [
        name
        for name in timm.list_models()
        if timm.model_entrypoint(name).__module__.startswith(PACKAGE)
        and (tests or not name.startswith("test_"))
    ]


def on_meta(name: str, **kwargs: Any) -> nn.Module:
    """A model without storage: its shapes, in a tenth of a second."""
    return timm.create_model(name, device="meta", **kwargs).eval()


def num_parameters(model: nn.Module) -> int:
    """Learned numbers of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def input_size(name: str) -> tuple[int, int, int]:
    """Channels, height and width that a model is evaluated at."""
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None, name
    return cfg.input_size
