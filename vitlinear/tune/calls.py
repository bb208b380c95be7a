"""The calls that are timed: those of a model at its own shapes, or one of each mechanism."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from vitlinear.create import build_model
from vitlinear.errors import UserError
from vitlinear.ops import MECHANISMS, Workload, get_mechanism
from vitlinear.ops.attention import examined
from vitlinear.ops.self_check import make_terms
from vitlinear.ops.terms import Terms
from vitlinear.ops.workload import Kind
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
        model = build_model(name, sizes={"img_size": size}).to(dtype)
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
    calls = [
        of_mechanism(name, (batch, length, heads, HEAD_DIM), dtype, ("rotary",))
        for name in names
        for length, heads in STAGES
    ]
    return list(_on(calls, device))


def of_mechanism(
    mechanism: str, shape: tuple[int, int, int, int], dtype: torch.dtype, terms: Iterable[str]
) -> Workload:
    """A call with queries [B, N, h, D], and what the mechanism takes of these terms.

    Powers and weights of keys are always given where there is room for them.
    """
    row = get_mechanism(mechanism)
    names = {*terms} - {"powers", "key_weights"}
    if row.takes_powers:
        names.add("powers")
    if row.takes_key_weights:
        names.add("key_weights")
    if row.positions == "none":
        names.discard("rotary")
    batch, length, heads, dim = shape
    given = tuple(name in names for name in Terms._fields)
    kind = Kind("meta", None, mechanism, dtype, dim, given, training=False)
    q = torch.empty(shape, dtype=dtype, device="meta")
    return examined(q, q, q, mechanism, make_terms(kind, 1, length, batch, heads)).work


def _on(calls: Iterable[Workload], device: torch.device) -> Iterator[Workload]:
    """The calls on a device, without a backward pass and with one."""
    for call in calls:
        for training in (False, True):
            yield call.on(device, training)
