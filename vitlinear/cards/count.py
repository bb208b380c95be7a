"""Multiply-adds of a model, counted by fvcore and split by what they are spent on.

fvcore's own rules count convolutions, linear layers, matrix products and norms. Added here: the
fused attention of PyTorch, RMSNorm, and every operator of ``torch.ops.vitlinear`` that has a flop
formula, so that a model costs the same whichever backend it runs on.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import flop_registry

from vitlinear.errors import UserError

PROJECTIONS = frozenset({"conv", "linear", "addmm", "baddbmm"})
PRODUCTS = frozenset({"matmul", "mm", "bmm", "einsum", "scaled_dot_product_attention"})
NORMS = frozenset({"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"})
NAMESPACE = "vitlinear::"


@dataclasses.dataclass(frozen=True)
class Cost:
    """Multiply-adds of one image.

    Attributes:
        total: All that follows, and the little that fits nowhere, such as pooling.
        projections: Convolutions and linear layers.
        attention: The matrix products of attention: queries with keys, weights or states with
            values, normalisers.
        norms: fvcore's estimates: two operations an element for a BatchNorm in evaluation, five
            for a LayerNorm.
    """

    total: int
    projections: int
    attention: int
    norms: int


def count(model: nn.Module, input_size: tuple[int, int, int]) -> Cost:
    """Count the multiply-adds of a model for one image.

    Args:
        model: With real parameters, on the CPU; it is run once and traced.
        input_size: Channels, height and width of the image.

    Raises:
        UserError: fvcore is not installed.
    """
    try:
        from fvcore.nn import FlopCountAnalysis  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError(
            "counting multiply-adds needs fvcore, which is missing: pip install fvcore"
        ) from error
    training = model.training
    model.eval()
    try:
        analysis = FlopCountAnalysis(model, torch.zeros(1, *input_size))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.tracer_warnings("none")
        analysis.set_op_handle("aten::scaled_dot_product_attention", _fused_attention)
        analysis.set_op_handle("aten::rms_norm", _rms_norm)
        analysis.set_op_handle("aten::baddbmm", _grouped_product)
        for packet, formula in flop_registry.items():
            if str(getattr(packet, "_qualified_op_name", "")).startswith(NAMESPACE):
                analysis.set_op_handle(packet._qualified_op_name, _registered(formula))
        # It notes the rules that it was given in place of its own.
        logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            operators: Counter[str] = analysis.by_operator()
    finally:
        model.train(training)
    ours = {name.partition("::")[2] for name in _registered_names()}
    parts = {
        part: int(sum(value for name, value in operators.items() if name in names))
        for part, names in (
            ("projections", PROJECTIONS),
            ("attention", PRODUCTS | ours - PROJECTIONS),
            ("norms", NORMS),
        )
    }
    return Cost(total=int(sum(operators.values())), **parts)


def _registered_names() -> list[str]:
    names = (str(getattr(packet, "_qualified_op_name", "")) for packet in flop_registry)
    return [name for name in names if name.startswith(NAMESPACE)]


def _argument(value: Any) -> Any:
    """An argument in a traced graph as a flop formula takes it: of tensors the shape."""
    if value.isCompleteTensor():
        return torch.Size(value.type().sizes())
    return value.toIValue()


def _registered(formula: Any) -> Any:
    """fvcore's form of a flop formula, which counts two operations for each multiply-add."""

    def multiply_adds(inputs: list[Any], outputs: list[Any]) -> int:
        shapes = [_argument(value) for value in outputs]
        return formula(*map(_argument, inputs), out_val=shapes) // 2

    return multiply_adds


def _fused_attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Of queries [..., N, D], keys [..., M, D] and values [..., M, V]: q k^T and p v."""
    q, k, v = (_argument(value) for value in inputs[:3])
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _grouped_product(inputs: list[Any], outputs: list[Any]) -> int:
    """Of [groups, M, K] and [groups, K, N], added to something."""
    a, b = (_argument(value) for value in inputs[1:3])
    return math.prod(a) * b[-1]


def _rms_norm(inputs: list[Any], outputs: list[Any]) -> int:
    """As fvcore's for LayerNorm, less the subtraction of a mean."""
    return 4 * math.prod(_argument(inputs[0]))
