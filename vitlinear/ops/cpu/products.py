"""Linear maps of channels, through oneDNN where PyTorch would take MKL.

In float32 on a CPU, `torch.nn.functional.linear` calls MKL, which uses AVX-512 on Intel's
processors alone: on others that have it, it is about half as fast as oneDNN
(`docs/cpu.md`). Everywhere else, where `MKL_KEEPS_UP` is true, oneDNN is as fast or a
little faster with operands that lie as it wants them, and slower with transposed ones and with many
small products. Both libraries are in PyTorch, and its compiler already chooses oneDNN for frozen
weights.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from ..tracing import PLAIN, stands_for_many, wants_common_operators


def onednn_available() -> bool:
    """Whether this PyTorch has both libraries, oneDNN with the operators that its compiler uses."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def mkl_keeps_up() -> bool:
    """Whether MKL uses all that this processor can do: Intel's, or without AVX-512.

    Unless this PyTorch, an older one, does not know.
    """
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    known = torch.cpu.get_capabilities()
    return str(known.get("cpu_name")).startswith("Intel") or known.get("avx512_f") is False


_AVAILABLE = onednn_available()
MKL_KEEPS_UP = mkl_keeps_up()

# From so many rows on, oneDNN's own layout of a weight that widens is worth making in each call:
# 5 to 20 % less time for 64 to 320 channels on AMD's processors with AVX-512, none on others.
PACK_ROWS = 4096

# From so many rows on, a call for each matrix costs less than oneDNN gains over MKL's batches.
MATMUL_ROWS = 512


def runs_on_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` takes oneDNN for these tensors.

    Subclasses of tensors (quantised, distributed) bring a product of their own.
    """
    return (
        _AVAILABLE
        and bool(torch.backends.mkldnn.enabled)
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and type(x) in PLAIN
        and type(weight) in PLAIN
        and not torch.is_autocast_enabled("cpu")
        and not wants_common_operators()
        and x.dim() > 1
        and x.numel() > 0
    )


def _dense(x: Tensor) -> Tensor:
    """x, copied unless it or its transpose is contiguous: with gaps oneDNN is 100 times slower."""
    return x if x.is_contiguous() or (x.dim() == 2 and x.t().is_contiguous()) else x.contiguous()


def _contiguous(bias: Tensor | None) -> Tensor | None:
    """The bias as oneDNN reads it: whatever its strides are, as if there were no gaps."""
    return None if bias is None else bias.contiguous()


# They ask without touching: ``data_ptr()`` counts as a wish to write.
_is_cow = torch._C._is_cow_tensor  # type: ignore[attr-defined]
_address = torch._C._data_address  # type: ignore[attr-defined]


class _Packed(NamedTuple):
    """A weight in oneDNN's own layout, kept by the memory that it was made from.

    It must never outlive a change of the weight, and PyTorch notes few of the ways there are to
    change one: fused optimisers, ``.data``, and arrays that share memory leave its version as it
    is. Copies on write see them all. A lazy copy shares the weight's memory, and whoever asks for
    that memory in order to write gives the weight other memory first.

    Attributes:
        source: The lazy copy; it holds on to the memory, whose address nobody else gets. None where
            none can be made.
        weight: In oneDNN's layout; None without a lazy copy.
    """

    source: Tensor | None
    weight: Tensor | None

    def fits(self, weight: Tensor) -> bool:
        """Whether the weight is still what it was."""
        return self.source is None or (
            _is_cow(weight)
            and _address(weight) == _address(self.source)
            and weight.stride() == self.source.stride()
            and weight.shape == self.source.shape
        )


# Attribute of a storage. No dictionary with weak keys: `torch.utils.swap_tensors` forbids those.
_KEPT = "_vitlinear_packed"
# Two threads may not make a lazy copy of one weight at a time, nor read it to copy it meanwhile.
_LOCK = threading.Lock()


def _owners(x: Tensor) -> int:
    """How many tensors and arrays share the memory, and what else holds it."""
    return torch._C._storage_Use_Count(x.untyped_storage()._cdata)


_ALONE = _owners(torch.empty(1))


def _packed(weight: Tensor) -> Tensor | None:
    """A weight in the layout that oneDNN chooses for many rows, kept until the weight changes.

    That layout is good for any number of rows: a tenth less time with 49 of them as with 60,000.
    None where somebody might change the weight unseen: through an array that shares its memory by
    now, a file, or another process.
    """
    kept: _Packed | None = getattr(weight.untyped_storage(), _KEPT, None)
    if kept is None or not kept.fits(weight):
        with _LOCK:
            kept = _pack(weight)
    return None if kept is None else kept.weight


def _private(weight: Tensor) -> Tensor:
    """A copy of a weight that other threads may read, for oneDNN to read unpacked.

    oneDNN asks for memory as if to write. A weight with a lazy copy would move to other memory, and
    what it leaves is freed, with threads that still read it.
    """
    with _LOCK:
        return weight.clone()


def _is_whole(weight: Tensor) -> bool:
    """Whether a weight is all of its memory, in order; parts and transposes are not packed."""
    return weight.is_contiguous() and weight.nbytes == weight.untyped_storage().nbytes()


def _pack(weight: Tensor) -> _Packed | None:
    if hasattr(weight.untyped_storage(), _KEPT):
        delattr(weight.untyped_storage(), _KEPT)
    if _owners(weight) != _ALONE:
        return None
    try:
        source = torch._lazy_clone(weight.detach())
    except RuntimeError:  # memory that is not PyTorch's own, for good
        kept = _Packed(None, None)
    else:
        # Of a copy: oneDNN asks for memory as if to write.
        dense = _dense(source.clone())
        kept = _Packed(source, torch.ops.mkldnn._reorder_linear_weight(dense, PACK_ROWS))
    setattr(weight.untyped_storage(), _KEPT, kept)
    return kept


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    frozen: bool = False,
) -> Tensor:
    """`linear` by oneDNN, where `runs_on_onednn`; no gradient."""
    x, bias = _dense(x), _contiguous(bias)
    packed = _packed(weight) if frozen and _is_whole(weight) else None
    if packed is None:
        if frozen or _is_cow(weight):
            weight = _private(weight)
        rows = x.numel() // x.shape[-1]
        weight = packed = _dense(weight)
        if not MKL_KEEPS_UP and rows >= PACK_ROWS and weight.shape[0] > weight.shape[1]:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], "none")
    return out


def outdoes_batches(x: Tensor, y: Tensor) -> bool:
    """Whether oneDNN, called for each matrix, may outdo MKL, called once for all of a batch."""
    return not (MKL_KEEPS_UP or torch.is_grad_enabled()) and runs_on_onednn(x, y)


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """x @ y, matrix by matrix through oneDNN where that is faster and no gradient is wanted.

    Args:
        x: [B, h, N, F].
        y: [B, h, F, D], or [1, h, F, D] for all samples.

    Returns:
        [B, h, N, D].
    """
    faster = outdoes_batches(x, y)
    if faster and torch.compiler.is_compiling():
        compiled: Tensor = torch.ops.vitlinear.matmul(x, y)
        return compiled
    if not faster or x.shape[2] < MATMUL_ROWS:
        return x @ y
    y = y.expand(x.shape[0], -1, -1, -1)
    outs = [product(a, b.t()) for a, b in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True)]
    out = outs[0][None] if len(outs) == 1 else torch.stack(outs)
    return out.unflatten(0, x.shape[:2])


@custom_op("vitlinear::matmul", mutates_args=(), device_types="cpu")
def matmul_op(x: Tensor, y: Tensor) -> Tensor:
    """`matmul` in compiled programs: one operator for any number of rows, so one program."""
    with torch.no_grad():  # which the program may have set for this part alone
        return matmul(x, y)


@matmul_op.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], y.shape[-1])


@custom_op("vitlinear::linear", mutates_args=(), device_types="cpu")
def linear_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, frozen: bool
) -> Tensor:
    """`product` in compiled graphs: inductor has a lowering of its operator, for constants only."""
    return product(x, weight, bias, activation, frozen)


@linear_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, frozen: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    frozen: bool = False,
) -> Tensor:
    if not torch.compiler.is_compiling():
        return product(x, weight, bias, activation, frozen)
    out: Tensor = torch.ops.vitlinear.linear(x, weight, bias, activation, frozen)
    return out


class _Linear(torch.autograd.Function):
    """x weight^T + bias; its gradients are products of the same kind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, frozen: bool) -> Tensor:
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.frozen = frozen
        return _product(x, weight, bias, frozen=frozen)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        # Others may look now than in the forward pass.
        plain = stands_for_many(grad) or wants_common_operators()
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = None
        if needs_x:
            grad_x = grad @ weight if plain else _Linear.apply(grad, weight.t(), None, ctx.frozen)
        if needs_weight:
            inputs = x.reshape(-1, x.shape[-1])
            if MKL_KEEPS_UP or plain:
                grad_weight = rows.t() @ inputs
            elif rows.shape[1] > inputs.shape[1]:
                # oneDNN copies its first operand where that is a transpose: the narrower one.
                grad_weight = _Linear.apply(inputs.t(), rows.t(), None, False).t()
            else:
                grad_weight = _Linear.apply(rows.t(), inputs.t(), None, False)
        return grad_x, grad_weight, rows.sum(0) if needs_bias else None, None


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether shapes and types fit; where they do not, PyTorch's own function says so best."""
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return False
    return bias is None or (
        bias.shape == weight.shape[:1]
        and bias.dtype == weight.dtype
        and bias.device == weight.device
    )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    frozen: bool = False,
) -> Tensor:
    """activation(x weight^T + bias), over the last axis.

    Args:
        x: [..., C_in].
        weight: [C_out, C_in].
        bias: [C_out], or None.
        activation: ``'none'``, or ``'gelu'``, which is part of the product where nothing is kept
            for a gradient.
        frozen: The weight will hardly change again: a copy in a layout that saves a tenth of the
            time may be kept until it does.

    Returns:
        [..., C_out].
    """
    if not runs_on_onednn(x, weight) or not _fits(x, weight, bias):
        out = F.linear(x, weight, bias)
    elif not torch.is_grad_enabled():
        return _product(x, weight, bias, activation, frozen)
    else:
        out = _Linear.apply(x, weight, bias, frozen)
    return F.gelu(out) if activation == "gelu" else out


def _flops(x: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    """Two for each multiply-add, as PyTorch counts products."""
    return 2 * x.numel() * out_shape[-1]


register_flop_formula([torch.ops.vitlinear.linear, torch.ops.vitlinear.matmul])(_flops)
if _AVAILABLE:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)
