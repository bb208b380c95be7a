"""The slices of one projection, whose gradient comes back as one buffer.

``projection.unbind(2)`` stacks the gradients of its slices: every one is written, read and written
once more. The backward pass of `linear_attention` writes them into one buffer that is laid out like
the projection, and here that buffer is handed on as it is. What else has looked at a slice is added
in place. Gradients that no such pass has made, those of the eager formula and of softmax attention,
are joined as they would be after ``unbind``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import tracing

# Attributes of tensors, which autograd hands on with them.
_SLICE = "_vitlinear_slice"  # of a slice of a projection
_GRADIENT = "_vitlinear_gradient"  # of the gradient of one: a slice of a buffer


class Slice(NamedTuple):
    """A slice of a projection.

    Attributes:
        projection: Stands for the projection.
        place: Of the slice.
        number: Of slices in the projection.
    """

    projection: object
    place: int
    number: int


class Gradient(NamedTuple):
    """The gradient of a slice, in a buffer that is laid out like the projection.

    Attributes:
        of: The slice.
        buffer: [B, N, P, h, D].
    """

    of: Slice
    buffer: Tensor


def unpack(projection: Tensor) -> tuple[Tensor, ...]:
    """Slices of a projection, and the values once more.

    Args:
        projection: [B, N, P, h, D] of queries, keys, from three slices on values, and of four a
            gate.

    Returns:
        [B, N, h, D] each, all views: the P slices, and from three on the values again, for whatever
        looks at them beside the attention, such as a convolution. Its gradient is added in place to
        what the attention has made, so a gradient of the values by themselves is not to be kept.
    """
    if (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and projection.requires_grad
        and type(projection) in (Tensor, nn.Parameter)
        and not tracing.is_watched()
    ):
        stands_for = object()
        slices = _Unpack.apply(projection, stands_for)
        number = projection.shape[2]
        for place, part in enumerate(slices[:number]):
            setattr(part, _SLICE, Slice(stands_for, place, number))
        return slices
    parts = projection.unbind(2)
    return (*parts, *parts[2:3])


def common_slices(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None) -> tuple[Slice, ...]:
    """The slices of one projection that these are, in their order; none if they are not.

    Queries and keys have to be; values too where the projection has more than two slices, and a
    gate if there is one.
    """
    first = getattr(q, _SLICE, None)
    if first is None:
        return ()
    others = (k,) if first.number == 2 else (k, v) if gate is None else (k, v, gate)
    slices = (first, *(getattr(x, _SLICE, None) for x in others))
    wanted = (Slice(first.projection, place, first.number) for place in range(len(slices)))
    return slices if slices == tuple(wanted) else ()


def mark(buffer: Tensor, slices: tuple[Slice, ...], grads: tuple[Tensor | None, ...]) -> None:
    """Say of gradients of slices that they are those of a buffer, which nobody else will read."""
    for of, grad in zip(slices, grads, strict=False):
        setattr(grad, _GRADIENT, Gradient(of, buffer))


class _Unpack(torch.autograd.Function):
    """Forward is `Tensor.unbind`, with the values once more."""

    @staticmethod
    def forward(ctx: Any, projection: Tensor, stands_for: object) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.stands_for = projection.shape, stands_for
        again = [projection.select(2, 2)] if projection.shape[2] > 2 else []
        return *projection.unbind(2), *again

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        parts, beside = list(grads), None
        if len(parts) > ctx.shape[2]:
            beside = parts.pop()
        given = [grad for grad in grads if grad is not None]
        if not given:
            return None, None
        if torch.is_grad_enabled() or any(
            type(grad) is not Tensor or tracing.is_watched(grad) for grad in given
        ):
            return _joined(parts, beside, given[0]), None
        marked: list[Gradient | None] = [getattr(part, _GRADIENT, None) for part in parts]
        buffers = [x.buffer for x in marked if x is not None and x.of.projection is ctx.stands_for]
        if not buffers:
            return _joined(parts, beside, given[0]), None
        buffer = buffers[0]
        for place, part in enumerate(parts):
            into, more = buffer.select(2, place), beside if place == 2 else None
            mark = marked[place]
            if mark is not None and mark.buffer is buffer and mark.of.place == place:
                if more is not None:
                    into.add_(more)
            elif part is not None and more is not None:
                into.copy_(part + more)  # a sum written to strided memory takes longer
            elif part is not None:
                into.copy_(part)
            elif more is not None:
                into.copy_(more)
            else:
                into.zero_()
        return buffer, None


def _joined(parts: list[Tensor | None], beside: Tensor | None, like: Tensor) -> Tensor:
    """The gradient where there is no buffer, by common operators, which have derivatives."""
    if beside is not None:
        parts[2] = beside if parts[2] is None else parts[2] + beside
    slices = [torch.zeros_like(like) if x is None else x for x in parts]
    return torch.cat([x.unsqueeze(2) for x in slices], 2)
