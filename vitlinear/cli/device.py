"""The device and the precision that a command runs in."""

import argparse
import contextlib
import functools
from typing import Any

import torch

import vitlinear  # noqa: F401  registers the models with timm
from vitlinear.errors import UserError, one_line


def choose_device(name: str | None) -> torch.device:
    """Returns the device that ``--device`` means, by default cuda where there is one."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error).split(". ")[0]
        raise UserError(f"--device {name} cannot be used here: {reason}") from error
    return device


def make_autocast(args: argparse.Namespace, device: torch.device) -> Any:
    """Returns a function that makes the context of a forward pass."""
    if not args.amp:
        return contextlib.nullcontext
    dtype = getattr(torch, args.amp_dtype)
    return functools.partial(torch.autocast, device_type=device.type, dtype=dtype)
