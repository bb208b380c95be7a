"""The dynamic convolution against a loop over samples, in every form it takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitlinear.layers.conv.dynamic_conv import DynamicConv, grouped_conv, shifted_sum


def defined(layer: DynamicConv, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Sample by sample, with kernels from matrices block by block."""
    dim, groups = x.shape[-1], layer.fc1.groups
    maps = []
    for image, token in zip(x, mean, strict=True):
        hidden = [
            w[:, :, 0] @ t
            for w, t in zip(layer.fc1.weight.chunk(groups), token.chunk(groups), strict=True)
        ]
        hidden = F.gelu(torch.cat(hidden) + layer.fc1.bias)
        kernel = [
            w[:, :, 0] @ t
            for w, t in zip(layer.fc2.weight.chunk(groups), hidden.chunk(groups), strict=True)
        ]
        kernel = (torch.cat(kernel) + layer.fc2.bias).reshape(dim, 1, 3, 3)
        out = F.conv2d(image.permute(2, 0, 1)[None], kernel, padding=1, groups=dim)
        maps.append(out[0].permute(1, 2, 0))
    return torch.stack(maps)


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (1, 4)])
@pytest.mark.parametrize("compiling", [False, True])
def test_dynamic_conv(size, compiling, monkeypatch):
    torch.manual_seed(0)
    layer = DynamicConv(12, 3).double()
    x = torch.randn(2, *size, 3, 12).double()[..., 1, :].requires_grad_()
    mean = torch.randn(2, 12).double().requires_grad_()
    expected = defined(layer, x, mean)
    # The form that compilers get, run plainly.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    out = layer(x, mean)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    inputs = (x, mean, *layer.parameters())
    for a, b in zip(
        torch.autograd.grad(out, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", [grouped_conv, shifted_sum])
def test_samples_keep_their_own_kernels(form):
    x, kernel = torch.randn(3, 4, 4, 2), torch.zeros(3, 2, 9)
    kernel[1, :, 4] = 1  # identity for the second sample alone
    out = form(x, kernel)
    torch.testing.assert_close(out[1], x[1])
    assert not out[0].any() and not out[2].any()


def test_autocast_follows_the_input():
    layer, x = DynamicConv(8, 2), torch.randn(2, 4, 4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x.bfloat16(), x.mean((1, 2)))
    assert out.dtype == torch.bfloat16
    expected = layer(x, x.mean((1, 2)))
    assert (out.float() - expected).norm() < 0.02 * expected.norm()
