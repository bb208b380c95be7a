"""MD-TPE, LightNet attention and RMS norms against their definitions, step by step."""

from __future__ import annotations

import pytest
import timm.layers
import torch

from vitlinear.layers import AxisTpe, HeadRmsNorm, LightNetAttention, MdTpe, RmsNorm, SwiGlu


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module.double()


def head_norm(x: torch.Tensor, weight: torch.Tensor, heads: int) -> torch.Tensor:
    x = x.unflatten(-1, (heads, -1))
    return (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()).flatten(-2) * weight


def scan(layer: AxisTpe, x: torch.Tensor) -> torch.Tensor:
    """The definition as a recurrence along the last axis but one, token after token."""
    heads = layer.num_heads
    decay = layer.log_decay.sigmoid()[:, None]
    product = (layer.query * layer.key).unflatten(0, (heads, -1)).sum(1, keepdim=True)
    x = x.unflatten(-1, (heads, -1))

    def one_way(tokens):
        state, states = torch.zeros_like(x[..., 0, :, :]), []
        for token in tokens:
            state = decay * state + token
            states.append(state)
        return states

    tokens = x.unbind(-3)
    y = torch.stack(one_way(tokens), -3)
    if layer.bidirectional:
        y = y + torch.stack(one_way(tokens[::-1])[::-1], -3) - x
    return head_norm((product * y).flatten(-2), layer.norm.weight, heads) @ layer.proj.weight.T


@pytest.mark.quick
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 7)])
def test_md_tpe_is_a_scan_of_each_axis(bidirectional, size):
    layer = randomise(MdTpe(12, 3, bidirectional))
    x = torch.randn(2, *size, 12).double().requires_grad_()
    down = scan(layer.rows, x.transpose(1, 2)).transpose(1, 2)
    expected = down + scan(layer.cols, x)
    torch.testing.assert_close(layer(x), expected)
    inputs = (x, *layer.parameters())
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad((layer(x) * weight).sum(), inputs)
    for grad, reference in zip(
        grads, torch.autograd.grad((expected * weight).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(grad, reference)


def test_causal_filter_sees_no_later_token():
    layer, x = randomise(AxisTpe(8, 2)), torch.randn(1, 1, 6, 8).double()
    later = x.clone()
    later[:, :, 4:] += 1
    assert torch.equal(layer(x)[:, :, :4], layer(later)[:, :, :4])
    layer.bidirectional = True
    assert not torch.allclose(layer(x)[:, :, 0], layer(later)[:, :, 0])


@pytest.mark.parametrize("log_decay, expected", [(-1e4, "token"), (1e4, "sum")])
def test_decay_at_its_ends(log_decay, expected):
    """lambda = 0 keeps the token alone, lambda = 1 sums; gradients stay finite."""
    layer, x = AxisTpe(8, 2), torch.randn(1, 1, 500, 8)
    torch.nn.init.constant_(layer.log_decay, log_decay)
    y = {"token": x, "sum": x.cumsum(2)}[expected]
    torch.testing.assert_close(
        layer(x), layer.proj(head_norm(4 * y, layer.norm.weight, 2)), rtol=1e-3, atol=1e-4
    )
    layer(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_filter_is_float32_under_autocast_and_in_half_precision():
    layer, x = randomise(AxisTpe(8, 2)).float(), torch.randn(2, 3, 40, 8).bfloat16()
    expected = layer(x.float())
    filtered: list[torch.dtype] = []
    layer.norm.register_forward_hook(lambda _, inputs, out: filtered.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    assert layer.bfloat16()(x).dtype == torch.bfloat16
    assert filtered == [torch.float32, torch.float32]


@pytest.mark.parametrize("backend", ["eager", "library"])
@pytest.mark.parametrize("size", [(1, 1), (3, 4)])
def test_lightnet_attention(backend, size):
    dim, heads = 24, 3
    layer = randomise(LightNetAttention(dim, heads, backend=backend))
    height, width = size
    x = torch.randn(2, height * width, dim).double()
    q, k, v = (y.unflatten(-1, (heads, -1)) for y in (x @ layer.qkv.weight.T).chunk(3, -1))
    q, kappa = torch.nn.functional.silu(q), k.softmax(1)
    e = dim // heads // 2
    theta = 10000.0 ** (-torch.arange(e).double() / e)
    angles = torch.stack(
        [torch.cat((r * theta, c * theta)) for r in range(height) for c in range(width)]
    )
    out = torch.zeros_like(q)
    for i in range(height * width):
        for j in range(height * width):
            score = (q[:, i] * kappa[:, j] * (angles[i] - angles[j]).cos()).sum(-1, keepdim=True)
            out[:, i] += score * v[:, j]
    gate = ((x @ layer.gate1.weight.T) @ layer.gate2.weight.T).sigmoid()
    expected = (head_norm(out.flatten(2), layer.norm.weight, heads) * gate) @ layer.proj.weight.T
    torch.testing.assert_close(layer(x, height, width), expected)


def test_glu_is_timms():
    ours, theirs = SwiGlu(12, 20), timm.layers.SwiGLU(12, 20, bias=False)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(x), theirs(x))


def test_lightnet_layers_reject_what_does_not_fit():
    with pytest.raises(ValueError, match="dim 9 does not divide into 3 heads of a multiple of 2"):
        LightNetAttention(9, 3)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        LightNetAttention(12, 3, backend="fast")
    with pytest.raises(ValueError, match="dim 10 does not divide into 3 heads"):
        MdTpe(10, 3)


def test_rms_norms():
    x = torch.randn(2, 5, 3, 4).double()
    norm, by_head = randomise(RmsNorm(4)), randomise(HeadRmsNorm(12, 3))
    torch.testing.assert_close(norm(x), head_norm(x, norm.weight, 1))
    torch.testing.assert_close(by_head(x), head_norm(x.flatten(-2), by_head.weight, 3))
    assert by_head.weight.shape == (12,)


@pytest.mark.parametrize("make", [lambda: RmsNorm(4), lambda: HeadRmsNorm(4, 1)])
def test_rms_norm_of_large_float16(make):
    x = torch.full((2, 1, 4), 3e4, dtype=torch.float16)
    assert torch.equal(make().half()(x).flatten(), torch.ones(8, dtype=torch.float16))
