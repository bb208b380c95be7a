"""InLine attention against the released code and its definition."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests import golden
from vitlinear.layers.attention.inline_attention import (
    InjectiveAttention,
    InLineAttention,
    InLineTokenAttention,
)
from vitlinear.layers.windows import equal_windows
from vitlinear.ops import naive

BACKENDS = pytest.mark.parametrize("backend", ["eager", "library"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def released(case: dict) -> dict[str, torch.Tensor]:
    """The weights of a golden case under our names."""
    weights, ours = case["weights"], {}
    for part in ("weight", "bias"):
        ours[f"qkv.{part}"] = torch.cat([weights[f"q.{part}"], weights[f"kv.{part}"]])
        ours[f"proj.{part}"] = weights[f"proj.{part}"]
        ours[f"attend.local.fc1.{part}"] = weights[f"residual.0.{part}"]
        ours[f"attend.local.fc2.{part}"] = weights[f"residual.2.{part}"]
    return ours


@BACKENDS
@pytest.mark.parametrize("form", ["tokens", "map"])
def test_golden_attention(backend, form):
    case = golden.attention_case("inline_a")
    size = case["H"], case["W"]
    layer = InLineTokenAttention if form == "tokens" else InLineAttention
    module = layer(case["C"], case["heads"], backend=backend).double()
    module.load_state_dict(released(case))
    x = case["x"].requires_grad_()
    out = module(x, *size) if form == "tokens" else module(x.unflatten(1, size)).flatten(1, 2)
    (grad,) = torch.autograd.grad(out, x, case["grad"])
    assert golden.relative_error(out, case["out"]) < 1e-6
    assert golden.relative_error(grad, case["grad_input"]) < 1e-6


@BACKENDS
def test_prefix_tokens_attend_and_stay_out_of_the_local_term(backend):
    module = InLineTokenAttention(8, 2, num_prefix_tokens=1, backend=backend).double()
    x = torch.randn(2, 1 + 12, 8).double()
    q, k, v = module.qkv(x).reshape(2, 13, 3, 2, 4).unbind(2)
    expected = naive.linear_attention(q, k, v, "inline").flatten(2)
    local = module.attend.local(v[:, 1:].reshape(2, 3, 4, 8), x.mean(1))
    expected = module.proj(torch.cat([expected[:, :1], expected[:, 1:] + local.flatten(1, 2)], 1))
    torch.testing.assert_close(module(x, 3, 4), expected)


@BACKENDS
def test_padding_equals_cropping(backend):
    """Padding below the map, NaN included, counts nowhere: not as keys, mean or neighbour."""
    module = InLineTokenAttention(8, 2, backend=backend).double()
    x = torch.randn(2, 5, 4, 8).double()
    expected = module(x[:, :3].flatten(1, 2), 3, 4)
    mask = torch.zeros(2, 5, 4, dtype=torch.bool)
    mask[:, 3:] = True
    x[:, 3:] = float("nan")
    out = module(x.flatten(1, 2), 5, 4, mask.flatten(1)).unflatten(1, (5, 4))[:, :3]
    torch.testing.assert_close(out.flatten(1, 2), expected)


@pytest.mark.parametrize("size, limit, expected", [
    (56, 56, (1, 56)), (28, 56, (1, 28)), (57, 56, (2, 29)), (1, 7, (1, 1)), (15, 7, (3, 5)),
    (500, 0, (1, 500)), (64, 7, (10, 7)),
])  # fmt: skip
def test_equal_windows(size, limit, expected):
    assert equal_windows(size, limit) == expected


@BACKENDS
@pytest.mark.parametrize("size", [(4, 4), (3, 5), (9, 6), (5, 11), (1, 1)])
def test_windows_are_maps_of_their_own(size, backend):
    """Each equal window gives what it would alone, cropped to the map."""
    height, width = size
    module = InLineAttention(8, 2, window_size=4, backend=backend).double()
    x = torch.randn(2, height, width, 8).double()
    (_, rows), (_, cols) = equal_windows(height, 4), equal_windows(width, 4)
    whole = InLineTokenAttention(8, 2).double()
    whole.load_state_dict(module.state_dict())
    expected = torch.empty_like(x)
    for top in range(0, height, rows):
        for left in range(0, width, cols):
            window = x[:, top : top + rows, left : left + cols]
            out = whole(window.flatten(1, 2), window.shape[1], window.shape[2])
            expected[:, top : top + rows, left : left + cols] = out.unflatten(1, window.shape[1:3])
    torch.testing.assert_close(module(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(module)
    torch.testing.assert_close(scripted(x), expected)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="dim 30 does not divide into 4 heads"):
        InLineAttention(30, 4)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        InjectiveAttention(24, 3, backend="fast")
