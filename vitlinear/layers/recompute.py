"""Modules in a row, of which backward computes the cheap ones again.

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

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from vitlinear.ops import RotaryTables as RotaryTables  # see `recomputes`
from vitlinear.ops.tracing import wants_common_operators

from .conv.depthwise_conv import DepthwiseConv, ResidualDepthwiseConv
from .plain import has_forward_hooks
from .rms_norm import RmsNorm

Pack = Callable[[Tensor], Any]
Unpack = Callable[[Any], Tensor]


class _Recipe(NamedTuple):
    """Recipe for a saved tensor: a view of what ``make`` returns.

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
        size, stride, offset = self.view
        return made.as_strided(size, stride, made.storage_offset() + offset)


def _place(x: Tensor) -> int:
    """The number of the memory that a tensor is in."""
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


class TakesRows(nn.Module):
    """Mixin of a convolution that takes rows of a map from other processes beside its input.

    Its ``forward`` takes, after the input, a list: an empty one is filled with the rows above and
    those below, [B, rows, W, C] both. With those in it the convolution gives the same again, of
    them and its input alone. The class after the mixin is that of the convolution.
    """


# Cheap, and the same whenever they run on the same input.
_CHEAP = (nn.GELU, nn.SiLU, nn.LayerNorm, LayerNorm, RmsNorm)
_CONVOLUTIONS = (nn.Conv2d, DepthwiseConv, ResidualDepthwiseConv)


def _can_run_again(module: nn.Module) -> bool:
    """Whether ``module.forward`` is cheap and gives what the module gave."""
    # A hook may change what goes in or comes out.
    if has_forward_hooks(module):
        return False
    # Not their subclasses, which may be random or observe what goes through them: those that
    # quantisation, parametrizations and others make.
    kind = type(module).__bases__[1] if isinstance(module, TakesRows) else type(module)
    if kind in _CONVOLUTIONS:
        return module.groups == module.in_channels
    return kind in _CHEAP


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def remaking(act: nn.Module, y: Tensor, x: Tensor) -> AbstractContextManager[None]:
    """As `recomputing`, of y = act(x): where act is an activation that gives the same again."""
    if can_recompute(y) and not _tensors(act) and _can_run_again(act):
        return recomputing(y, act.forward, x)
    return nullcontext()


class _Chain:
    """Modules in a row, run again from the input of the first, with the weights of this moment.

    The modules may have others by then: `torch.func.functional_call` lends them for a call.
    Backward asks for what comes out last first, and on the way to it makes all that it asks for
    next: that is held until then.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        # The last is not run again.
        self.modules = [(module, _tensors(module)) for module in modules[:-1]]
        self.made: dict[int, Tensor] = {}

    def run(self, count: int, x: Tensor, *rows: Tensor) -> Tensor:
        """Run the first ``count`` modules; returns the output of the last of them.

        Args:
            count: At least 1.
            x: Input of the first.
            *rows: What those of them that are `TakesRows` took beside their inputs.
        """
        if count in self.made:
            return self.made.pop(count)
        for i, (module, held) in enumerate(self.modules[:count], 1):
            args: tuple[Any, ...] = (x,)
            if isinstance(module, TakesRows):
                args, rows = (x, list(rows[:2])), rows[2:]
            now = _tensors(module)
            if all(now.get(name) is value for name, value in held.items()):
                x = module.forward(*args)
            else:
                x = functional_call(module, held, args)
            if i < count:
                self.made[i] = x
        return x


def _compiles_for_training() -> bool:
    """Whether a compiler looks that makes a backward pass as well, and for this place."""
    return (
        torch.compiler.is_compiling() and torch.is_grad_enabled() and not wants_common_operators()
    )


def _compute_twice(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Modules in a row, all marked for the compiler to run again in backward."""

    def run(x: Tensor) -> Tensor:
        for module in modules:
            x = module(x)
        return x

    y: Tensor = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
    return y


def run_recomputing(modules: Sequence[nn.Module], x: Tensor, *args: Any) -> Tensor:
    """``modules[-1](...modules[1](modules[0](x)), *args)``, keeping less for backward.

    What comes out of all but the last is not kept for the sake of the next one: backward makes it
    again from x, with autograd's own formulas for the rest. Cheap modules only: activations,
    norms, depthwise convolutions. From the first on that is none of those, or has forward hooks,
    autograd keeps what it always keeps. A compiler, which by itself keeps more here than eager mode
    does, is told the same if it holds for all but the last.

    Args:
        modules: At least two.
        x: Input of the first, which keeps it anyway.
        args: Further arguments of the last.
    """
    *first, last = modules
    # A compiled backward pass would take the rows from other processes again.
    alone = not any(isinstance(module, TakesRows) for module in first)
    if alone and _compiles_for_training() and all(map(_can_run_again, first)):
        return last(_compute_twice(first, x), *args)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        for module in first:
            x = module(x)
        return last(x, *args)
    rows: list[Tensor] = []  # of other processes, taken so far

    def run(module: nn.Module, y: Tensor, *rest: Any) -> Tensor:
        if not isinstance(module, TakesRows):
            z: Tensor = module(y, *rest)
            return z
        taken: list[Tensor] = []
        z = module(y, taken, *rest)
        rows.extend(taken)
        return z

    y = run(modules[0], x)
    cheap = _can_run_again(modules[0])
    chain = _Chain(modules)
    for i, module in enumerate(modules[1:], 1):
        rest = args if i == len(modules) - 1 else ()
        if cheap:
            with recomputing(y, partial(chain.run, i), x, *rows):
                y = run(module, y, *rest)
            cheap = _can_run_again(module)
        else:
            y = run(module, y, *rest)
    return y


def recomputes(first: str, last: str) -> Callable[..., Any]:
    """Make a method that returns ``self.last(self.first(x), *args)`` use `run_recomputing`.

    TorchScript compiles the source of the method and leaves decorators out: there the method runs
    as it stands. It looks up the types that the method names in this file: Tensor, RotaryTables.

    Args:
        first: Name of the cheap module, whose output backward makes again.
        last: Name of the module that takes it.
    """

    def decorate(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(method)
        def run(self: nn.Module, x: Tensor, *args: Any) -> Tensor:
            return run_recomputing((getattr(self, first), getattr(self, last)), x, *args)

        return run

    return decorate
