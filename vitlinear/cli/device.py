"""The device and the precision that a command runs in."""

import contextlib
import functools
from argparse import BooleanOptionalAction
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import is_distributed_env

from vitlinear.errors import UserError, one_line
from vitlinear.processes import own_gpu

from .parser import Parser


@dataclass(frozen=True)
class DeviceConfig:
    """Where a command runs, in which precision and memory format."""

    device: str | None
    amp: bool
    amp_dtype: str
    channels_last: bool

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Type of autocast; None without it."""
        return getattr(torch, self.amp_dtype) if self.amp else None

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory format that models and images are brought into."""
        return torch.channels_last if self.channels_last else torch.preserve_format


def add_device_flags(parser: Parser) -> None:
    """Adds the flags of `DeviceConfig`."""
    group = parser.group("device")
    group.add_argument(
        "--device", default=None, metavar="DEV", help="default: cuda if there is one"
    )
    group.add_argument("--amp", action=BooleanOptionalAction, default=False, help="autocast")
    group.add_argument(
        "--amp-dtype", default="float16", choices=("float16", "bfloat16"), help="of --amp"
    )
    parser.needs("amp_dtype", "amp")
    group.add_argument(
        "--channels-last",
        action=BooleanOptionalAction,
        default=False,
        help="memory format of images and weights",
    )


def choose_device(name: str | None) -> torch.device:
    """Returns the device that ``--device`` means, by default cuda where there is one.

    A GPU has its number. If none is asked for, it is the process's own among several, or else the
    current one.

    Raises:
        UserError: There is no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and is_distributed_env():
            device = own_gpu()  # a tensor on another's takes memory there
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is None:  # PyTorch's set_device wants a number
            device = torch.device("cuda", torch.cuda.current_device())
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error).split(". ")[0]
        raise UserError(f"--device {name} cannot be used here: {reason}") from error
    return device


def make_autocast(config: DeviceConfig, device: torch.device) -> Any:
    """Returns a function that makes the context of a forward pass."""
    if config.autocast_dtype is None:
        return contextlib.nullcontext
    return functools.partial(torch.autocast, device_type=device.type, dtype=config.autocast_dtype)
