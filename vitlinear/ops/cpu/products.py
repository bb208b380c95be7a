"""Linear maps of channels, through oneDNN where PyTorch would take MKL.

In float32 on a CPU, `torch.nn.functional.linear` calls MKL, which uses AVX-512 on Intel's
processors alone: on others that have it, it is about half as fast as oneDNN
(`docs/cpu.md`). Everywhere else, where `MKL_KEEPS_UP` is true, oneDNN is as fast or a
little faster with operands that lie as it wants them, and slower with transposed ones and with many
small products. Both libraries are in PyTorch, and its compiler already chooses oneDNN for frozen
weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import custom_op
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

from ..tracing import stands_for_many, wants_common_operators


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
        and type(weight) in (Tensor, nn.Parameter)
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


# Weights in oneDNN's own layout, with the memory and version of what they were made from.
_PACKED = WeakTensorKeyDictionary()


def _packed(weight: Tensor) -> Tensor:
    """A weight in the layout that oneDNN chooses for many rows, kept until the weight changes.

    That layout is good for any number of rows: a tenth less time with 49 of them as with 60,000.
    """
    # An address alone may be that of memory that was freed and given out again.
    state = StorageWeakRef(weight.untyped_storage()), weight.data_ptr(), weight._version
    made, packed = _PACKED.get(weight, (None, weight))
    if made != state:
        packed = torch.ops.mkldnn._reorder_linear_weight(_dense(weight.detach()), PACK_ROWS)
        _PACKED[weight] = state, packed
    return packed


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    frozen: bool = False,
) -> Tensor:
    """`linear` by oneDNN, where `runs_on_onednn`; no gradient."""
    x, bias = _dense(x), _contiguous(bias)
    if frozen and not weight.is_inference():  # which has no version
        weight = _packed(weight)
    else:
        weight = _dense(weight)
        rows = x.numel() // x.shape[-1]
        if not MKL_KEEPS_UP and rows >= PACK_ROWS and weight.shape[0] > weight.shape[1]:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")
    return out


def outdoes_batches(x: Tensor, y: Tensor) -> bool:
    """Whether oneDNN, called for each matrix, may outdo MKL, called once for all of a batch."""
    return not (MKL_KEEPS_UP or torch.is_grad_enabled()) and runs_on_onednn(x, y)


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """x @ y, matrix by matrix through oneDNN where that is faster and no gradient is wanted.

    Args:
        x: [B, h, N, F].
        y: [B, h, F, D].

    Returns:
        [B, h, N, D].
    """
    faster = outdoes_batches(x, y)
    if faster and torch.compiler.is_compiling():
        compiled: Tensor = torch.ops.vitlinear.matmul(x, y)
        return compiled
    if not faster or x.shape[2] < MATMUL_ROWS:
        return x @ y
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
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        plain = stands_for_many(grad)
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = None
        if needs_x:
            grad_x = grad @ weight if plain else _Linear.apply(grad, weight.t(), None)
        if needs_weight:
            inputs = x.reshape(-1, x.shape[-1])
            if MKL_KEEPS_UP or plain:
                grad_weight = rows.t() @ inputs
            elif rows.shape[1] > inputs.shape[1]:
                # oneDNN copies its first operand where that is a transpose: the narrower one.
                grad_weight = _Linear.apply(inputs.t(), rows.t(), None).t()
            else:
                grad_weight = _Linear.apply(rows.t(), inputs.t(), None)
        return grad_x, grad_weight, rows.sum(0) if needs_bias else None


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
        frozen: The weight will hardly change again: where nothing is kept for a gradient, a copy in
            a layout that saves a tenth of the time may be kept as long as it lives.

    Returns:
        [..., C_out].
    """
    if not runs_on_onednn(x, weight) or not _fits(x, weight, bias):
        out = F.linear(x, weight, bias)
    elif not torch.is_grad_enabled():
        return _product(x, weight, bias, activation, frozen)
    else:
        if frozen and not torch.compiler.is_compiling():
            # A step may follow, and fused optimisers do not raise a parameter's version.
            _PACKED.pop(weight, None)
        out = _Linear.apply(x, weight, bias)
    return F.gelu(out) if activation == "gelu" else out


def _flops(x: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    """Two for each multiply-add, as PyTorch counts products."""
    return 2 * x.numel() * out_shape[-1]


register_flop_formula([torch.ops.vitlinear.linear, torch.ops.vitlinear.matmul])(_flops)
if _AVAILABLE:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)
