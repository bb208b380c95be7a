"""Cases that kernel tests share: how q, k and v may lie in memory, and small splits."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.ops.inputs import Inputs, attend, double, oracle

# One rounding to the type: what even an exact kernel may add.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}
GRIDS = {1: (1, 1), 17: (1, 17), 49: (7, 7), 63: (7, 9), 65: (5, 13), 196: (14, 14)}


def run(mechanism: str, inputs: Inputs, layout: str = "projection") -> tuple[Tensor, Tensor]:
    """Output and gradient of the projection by the kernels."""
    source = inputs.projection.detach()
    if layout == "channels first":  # what a 1x1 convolution of an NCHW map gives
        leaf = source.permute(0, 2, 3, 4, 1).contiguous().requires_grad_()
        projection = leaf.permute(0, 4, 1, 2, 3)
    elif layout == "heads first":
        leaf = source.permute(0, 3, 2, 1, 4).contiguous().requires_grad_()
        projection = leaf.permute(0, 3, 2, 1, 4)
    else:
        leaf = source.clone().requires_grad_()
        projection = leaf
    out = attend(mechanism, inputs, "triton", projection)
    grad = inputs.grad
    if layout != "projection":  # a gradient with strides of its own
        grad = grad.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    (found,) = torch.autograd.grad(out, leaf, grad)
    orders = {"channels first": (0, 4, 1, 2, 3), "heads first": (0, 3, 2, 1, 4)}
    return out, found.permute(orders[layout]) if layout in orders else found


def reference(mechanism: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Output and gradient of the projection in float64.

    From the definition while that is quick, and from the eager formula, which other tests hold to
    it, for many tokens and for samples of padding alone, where the definition divides by zero.
    """
    if inputs.grad.shape[1] < 50 and inputs.mask is None:
        return oracle(mechanism, inputs)
    projection = inputs.projection.detach().double().requires_grad_()
    scale = None if inputs.head_scale is None else inputs.head_scale.detach().double()
    inputs = inputs._replace(
        rotary=double(inputs.rotary), cosine=double(inputs.cosine), head_scale=scale
    )
    out = attend(mechanism, inputs, "eager", projection)
    return out, torch.autograd.grad(out, projection, inputs.grad.double())[0]


def error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of the expected, or over 0.1 in each entry if larger.

    With one token some gradients are exactly zero.
    """
    actual, expected = actual.detach().double(), expected.detach().double()
    floor = 0.1 * expected.numel() ** 0.5
    return float((actual - expected).norm() / expected.norm().clamp(min=floor))


def check_exactness(mechanism, inputs, layout="projection"):
    """Twice the error of the eager formula at most, of the output and of each gradient."""
    expected = reference(mechanism, inputs)
    eager = attend(mechanism, inputs, "eager")
    eager = (eager, torch.autograd.grad(eager, inputs.projection, inputs.grad)[0])
    fused = run(mechanism, inputs, layout)
    rounding = ROUNDING[inputs.projection.dtype]
    names = ("output", "grad_q", "grad_k", "grad_v", "grad_gate", "grad_lepe")
    parts = 5 if inputs.epilogue else 3
    split = [(out, *grad.unbind(2)[:parts]) for out, grad in (fused, eager, expected)]
    for name, actual, plain, exact in zip(names[: parts + 1], *split, strict=True):
        assert actual.isfinite().all(), name
        found, allowed = error(actual, exact), 2 * error(plain, exact) + rounding
        assert found <= allowed, f"{name}: error {found:.2e}, allowed {allowed:.2e}"


def many_splits(monkeypatch) -> None:
    """Cut even the short sequences of tests, into splits of 32 tokens."""
    from vitlinear.ops.triton import calls

    monkeypatch.setattr(calls, "SHORTEST_CUT", 17)
    monkeypatch.setattr(calls, "SHORTEST_SPLIT", 32)
    monkeypatch.setattr(calls, "processors", lambda device: 64)
    monkeypatch.setattr(calls, "_prepared", {})


def by_operators(mechanism, projection, rotary, grad, backend):
    """Output and gradient of q, k and v by the registered operators alone, without autograd."""
    q, k, v, _ = projection.unbind(2)
    given = (mechanism, *rotary, *[None] * 6)
    out, *saved = torch.ops.vitlinear.linear_attention(q, k, v, *given, backend)
    found = torch.ops.vitlinear.linear_attention_backward(grad, q, k, v, *given, *saved, backend)
    return out, found[0]
