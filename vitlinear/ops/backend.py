"""Which implementation of an attention runs, and why.

``eager``    the formulas of `vitlinear.ops.eager`: any derivative, fused by `torch.compile`,
             exported to anything.
``library``  the registered operators of `vitlinear.ops.library`: closed-form backward that keeps
             only q, k and v, opaque to compilers.
``auto``     what the environment variable ``VITLINEAR_BACKEND`` says, else ``eager``: the two are
             about as fast on CPUs (benchmarks/README.md), and eager can do more.

Modules take the choice for linear attention; their softmax stages always run on SDPA.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

BACKENDS = ("auto", "eager", "library")
ENVIRONMENT_VARIABLE = "VITLINEAR_BACKEND"

# Read once: a look-up at each call would be a guard, or a break, in compiled graphs.
_from_environment = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"


class Choice(NamedTuple):
    """A backend and the reason that it was taken."""

    backend: str
    reason: str


def check_backend(name: str, source: str = "backend") -> str:
    """Return the name if it is one of `BACKENDS`.

    Raises:
        ValueError: It is not; the message says where the name came from.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown {source} {name!r}; choose from: {', '.join(BACKENDS)}")
    return name


def choose_backend(requested: str = "auto") -> Choice:
    """Decide what runs for an attention call.

    Args:
        requested: One of `BACKENDS`. A name other than ``auto`` wins over the environment.

    Returns:
        ``eager`` or ``library``, with the reason in words.

    Raises:
        ValueError: The name, or that in ``VITLINEAR_BACKEND``, is unknown.
    """
    if check_backend(requested) != "auto":
        choice = Choice(requested, "asked for by argument")
    elif check_backend(_from_environment, f"{ENVIRONMENT_VARIABLE} value") != "auto":
        choice = Choice(_from_environment, f"set by {ENVIRONMENT_VARIABLE}")
    else:
        choice = Choice("eager", "auto: no fused kernel in this version")
    if choice.backend == "library" and torch.onnx.is_in_onnx_export():
        choice = Choice("eager", "ONNX has no vitlinear operators")
    return choice
