"""How a model is compiled for training."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._inductor import list_mode_options

from vitlinear.cli.parser import Parser
from vitlinear.errors import UserError, did_you_mean, one_line
from vitlinear.layers.layout import KEEP_LAYOUT


@dataclass(frozen=True)
class CompileConfig:
    """Backend of `torch.compile`, None for none, and its mode."""

    torchcompile: str | None
    torchcompile_mode: str | None


def add_compile_flags(parser: Parser) -> None:
    """Adds the flags of `CompileConfig`."""
    group = parser.group("weights")
    group.add_argument(
        "--torchcompile",
        nargs="?",
        const="inductor",
        default=None,
        metavar="BACKEND",
        help="compile the model",
    )
    group.add_argument("--torchcompile-mode", default=None, metavar="MODE", help="of torch.compile")
    parser.needs("torchcompile_mode", "torchcompile")


def compile_arguments(model: nn.Module, backend: str, mode: str | None = None) -> dict[str, Any]:
    """Returns the arguments of `torch.compile` that suit a model.

    Inductor's layout optimisation takes each tensor of four axes that it keeps near a convolution
    for [B, C, H, W] and copies it to channels-last. Our maps are [B, H, W, C] and heads
    [B, h, N, D]: they are to stay as they are (`docs/compile.md`).

    Args:
        model: The model, or one of its blocks.
        backend: A backend of `torch.compile`.
        mode: A mode of `torch.compile`, of inductor alone.

    Raises:
        UserError: Unknown backend or mode, or a mode of a backend that has none.
    """
    known = torch.compiler.list_backends(())
    if backend not in known:
        raise UserError(
            f"unknown --torchcompile {backend}{did_you_mean(backend, known)}; torch has "
            f"{', '.join(torch.compiler.list_backends())}"
        )
    if backend != "inductor":
        if mode:
            raise UserError(
                f"--torchcompile-mode has no effect on --torchcompile {backend}: leave it out"
            )
        return {"backend": backend}
    try:
        options = list_mode_options(mode or "default")
    except RuntimeError as error:
        raise UserError(f"--torchcompile-mode: {one_line(error)}") from error
    if not type(model).__module__.startswith("vitlinear."):
        return {"backend": backend, "mode": mode}
    return {"backend": backend, "options": {**options, **KEEP_LAYOUT}}
