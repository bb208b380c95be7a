"""Rotation of pairs of channels as a product of complex numbers.

In eager mode that is one vectorised pass, and autograd keeps the table alone; as products of real
numbers it is about ten passes over every second number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..tracing import keeps_nothing, wants_common_operators


def rotate_pairs(x: Tensor, table: Tensor, inverse: bool = False, *, own: bool = False) -> Tensor:
    """Turn each pair (x0, x1) of channels to (x0 cos - x1 sin, x1 cos + x0 sin).

    Args:
        x: [..., N, D] in the table's type.
        table: Cosines and sines of the tokens' angles, [N, D/2, 2]; [h, N, D/2, 2] where heads,
            which stand before tokens, have angles of their own.
        inverse: Turn backwards.
        own: x may be written to, where nothing is kept for a gradient.

    Returns:
        [..., N, D].
    """
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
        # The operator has no gradient of the table.
        learned = table.requires_grad and torch.is_grad_enabled()
        if x.device.type == "cpu" and not learned and not wants_common_operators():
            out: Tensor = torch.ops.vitlinear.rotate(x, table, inverse)
            return out
        return _real_rotation(x, table, inverse)
    pairs, turns = _pairs(x), _turns(table, inverse)
    turned = pairs.mul_(turns) if own and keeps_nothing() else pairs * turns
    return torch.view_as_real(turned).flatten(-2)


def _real_rotation(x: Tensor, table: Tensor, inverse: bool) -> Tensor:
    """The same in real numbers: inductor fuses it on GPUs, and ONNX has no complex ones."""
    cos, sin = table.unbind(-1)
    if inverse:
        sin = -sin
    x0, x1 = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), dim=-1).flatten(-2)


def _pairs(x: Tensor) -> Tensor:
    """[..., D] as complex numbers [..., D/2]."""
    if x.stride(-1) != 1 or x.storage_offset() % 2 or any(s % 2 for s in x.stride()[:-1]):
        # A pair must lie as a complex number does; contiguous() would leave an odd offset.
        x = x.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _turns(table: Tensor, inverse: bool) -> Tensor:
    """[N, D/2, 2] as complex numbers."""
    turns = torch.view_as_complex(table)
    # Not the lazy conj(): a custom operator called from a compiled graph runs below the dispatch
    # key that resolves it, and would silently turn the wrong way.
    return turns.conj_physical() if inverse else turns


@custom_op("vitlinear::rotate", mutates_args=(), device_types="cpu")
def rotate_op(x: Tensor, table: Tensor, inverse: bool) -> Tensor:
    """`rotate_pairs` in compiled programs: inductor does not vectorise loops over pairs."""
    out = x.new_empty(x.shape)
    torch.mul(_pairs(x), _turns(table, inverse), out=_pairs(out))
    return out


@rotate_op.register_fake
def _(x: Tensor, table: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _keep_table(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    _, table, ctx.inverse = inputs
    ctx.save_for_backward(table)


def _rotate_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.vitlinear.rotate(grad, *ctx.saved_tensors, not ctx.inverse), None, None


rotate_op.register_autograd(_rotate_back, setup_context=_keep_table)
