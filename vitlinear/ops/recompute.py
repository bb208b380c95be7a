"""Tensors that backward computes again instead of keeping.

What a cheap step puts out, such as a GELU or a norm, is often kept for backward beside what went
in, because the next step needs it. Inside of `recomputing` autograd keeps a recipe in its place::

    y = F.gelu(x)
    with recomputing(y, F.gelu, x):
        z = conv(y)  # keeps how y comes from x, which gelu keeps anyway

The gradients are autograd's own, of any order. It works through the hooks for saved tensors of
`torch.autograd.graph`, and passes on to those that are in force already what it keeps: gradient
checkpointing and the like see nothing unusual. Compilers, exporters and tracers see the plain
program, which they optimise themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

Pack = Callable[[Tensor], Any]
Unpack = Callable[[Any], Tensor]


class _Recipe(NamedTuple):
    """How to make a saved tensor again: a view of what ``make`` returns.

    Attributes:
        make: Makes what it is a view of.
        layout: Size and stride of that.
        view: Size, stride and offset of the saved tensor.
    """

    make: Callable[[], Tensor]
    layout: tuple[Any, Any]
    view: tuple[Any, Any, Any]

    def follow(self) -> Tensor:
        made = self.make()
        if made.stride() != self.layout[1]:
            made = made.new_empty_strided(*self.layout).copy_(made)
        return made.as_strided(*self.view)


def _place(x: Tensor) -> int:
    """Which memory a tensor is in."""
    return x.untyped_storage()._cdata


def _as_it_is(x: Any) -> Any:
    return x


def _outer_hooks() -> tuple[Pack, Unpack] | None:
    """The hooks for saved tensors that are in force."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def can_recompute(x: Tensor) -> bool:
    """Whether autograd will keep something of a computation on x, and may keep recipes."""
    return (
        type(x) is Tensor
        and x.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        # The transforms of torch.func forbid hooks.
        and torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
        and x.device.type != "meta"
    )


@contextmanager
def recomputing(y: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Iterator[None]:
    """Inside, let autograd keep for backward how y was made in the place of y.

    Does nothing where `can_recompute` says no, or where y was made in the memory of an input.

    Args:
        y: ``function(*inputs)``, alone in its memory.
        function: Gives the same whenever it is called: nothing random. It may hold parameters.
        inputs: What backward keeps anyway.
    """
    if not can_recompute(y) or any(_place(y) == _place(x) for x in inputs):
        yield
        return
    # Autograd holds on to the hooks: what they refer to would stay until backward.
    place, dtype, device = _place(y), y.dtype, y.device.type
    layout, offset = (y.size(), y.stride()), y.storage_offset()
    detached = [x.detach() for x in inputs]
    keep, take = _outer_hooks() or (_as_it_is, _as_it_is)
    autocast = torch.is_autocast_enabled(device)
    autocast_dtype = torch.get_autocast_dtype(device) if autocast else None

    def pack(x: Tensor) -> Any:
        if _place(x) != place or x.dtype != dtype:
            return keep(x)
        kept = [keep(value) for value in detached]

        def make() -> Tensor:
            with (
                torch.no_grad(),
                torch.autocast(device, autocast_dtype) if autocast else nullcontext(),
            ):
                return function(*map(take, kept))

        return _Recipe(make, layout, (x.size(), x.stride(), x.storage_offset() - offset))

    def unpack(kept: Any) -> Tensor:
        return kept.follow() if isinstance(kept, _Recipe) else take(kept)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        detached.clear()
