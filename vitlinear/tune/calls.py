"""The calls that are timed: those of a model at its own shapes, or one of each mechanism."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from vitlinear.create import build_model
from vitlinear.errors import UserError
from vitlinear.ops import MECHANISMS, Workload
from vitlinear.ops.terms import Terms
from vitlinear.report import attention_calls

# Tokens of a map, and heads, of three stages of a pyramid at 224 pixels.
STAGES = ((3136, 1), (784, 2), (196, 4))
HEAD_DIM = 64


def batch_at(batch: int, size: int, sizes: Sequence[int]) -> int:
    """Images of a size that have about as many pixels as a batch of the smallest size."""
    return max(1, batch * min(sizes) ** 2 // size**2)


def of_model(
    name: str, sizes: Sequence[int], batch: int, dtype: torch.dtype, device: torch.device
) -> list[Workload]:
    """The attention calls of a model, each once, in inference and in training.

    Raises:
        UserError: There is no such model, it has no linear attention, or it takes no such images.
    """
    found: list[Workload] = []
    for size in sizes:
        model = build_model(name, img_size=size).to(dtype)
        channels = getattr(model, "in_chans", 3)
        images = (batch_at(batch, size, sizes), channels, size, size)
        try:
            calls = attention_calls(model, images)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"cannot trace {name} at {size} pixels: {error}") from error
        found += [call.work for call in calls if call.work is not None]
    if not found:
        raise UserError(f"{name} has softmax attention alone, which PyTorch runs: nothing to tune")
    return list(dict.fromkeys(_on(found, device)))


def of_mechanisms(
    batch: int, dtype: torch.dtype, device: torch.device, names: Iterable[str] = MECHANISMS
) -> list[Workload]:
    """A call of every mechanism in three stages of a pyramid, with position tables."""
    given = tuple(term == "rotary" for term in Terms._fields)
    calls = [
        Workload("cuda", dtype, length, HEAD_DIM, name, "", batch, heads, None, given)
        for name in names
        for length, heads in STAGES
    ]
    return list(_on(calls, device))


def _on(calls: Iterable[Workload], device: torch.device) -> Iterator[Workload]:
    """The calls on a device, without a backward pass and with one."""
    for call in calls:
        for training in (False, True):
            yield call._replace(device=device.type, device_index=device.index, training=training)
