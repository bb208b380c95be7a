"""Attention of ViT³ against the released code, autograd, and its edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import golden
from vitlinear import ops
from vitlinear.layers.attention.ttt_attention import TttAttention
from vitlinear.ops import naive

BACKENDS = pytest.mark.parametrize("backend", ["eager", "library"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(dim: int = 12, heads: int = 3, **kwargs) -> TttAttention:
    """A layer whose inner networks are not small, as they are at first."""
    layer = TttAttention(dim, heads, **kwargs)
    for weight in (layer.w1, layer.w2, layer.w3):
        nn.init.normal_(weight, std=0.5)
    return layer.double()


def tables(height: int, width: int, dim: int) -> ops.RotaryTables:
    return ops.full_width_rotary_tables(height, width, dim, dtype=torch.float64)


@BACKENDS
@pytest.mark.parametrize("name", ["vittt_attn_a", "h_vittt_attn_b"])
def test_golden_attention(name, backend):
    case = golden.attention_case(name, "vittt")
    size = case["H"], case["W"]
    layer = TttAttention(case["C"], case["heads"], backend=backend).double()
    own = layer.state_dict()
    layer.load_state_dict({k: v.reshape(own[k].shape) for k, v in case["weights"].items()})
    rotary = golden.full_width_tables(*size, case["C"]) if name.startswith("h_") else None
    x = case["x"].requires_grad_()
    out = layer(x.unflatten(1, size), rotary).flatten(1, 2)
    assert golden.relative_error(out, case["out"]) < 1e-14
    wanted = {"input": x, "w1": layer.w1, "w2": layer.w2, "w3": layer.w3}
    grads = torch.autograd.grad(out, tuple(wanted.values()), case["grad"])
    for key, grad in zip(wanted, grads, strict=True):
        expected = case[f"grad_{key}"].reshape(grad.shape)
        assert golden.relative_error(grad, expected) < 1e-14, key


def trained(loss: Tensor, weight: Tensor, dims: tuple[int, ...]) -> Tensor:
    """A step of gradient descent that autograd finds."""
    (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
    return weight - grad / (grad.norm(dim=dims, keepdim=True) + 1)


def definition(layer: TttAttention, x: Tensor, rotary: ops.RotaryTables | None) -> Tensor:
    """One sample and one head after the other; the inner gradients by autograd."""
    heads, dim = layer.num_heads, layer.head_dim
    outs = []
    for sample in x:
        H, W, C = sample.shape
        qkv = sample @ layer.qkv.weight.T + layer.qkv.bias
        q, k, v = (part.reshape(H * W, heads, dim) for part in qkv[..., : 3 * C].split(C, -1))
        if rotary is not None:
            q, k = (naive.rotate_tokens(part[None], rotary)[0] for part in (q, k))
        parts = []
        for i in range(heads):
            w1, w2 = layer.w1[i], layer.w2[i]
            f = (k[:, i] @ w1) * F.silu(k[:, i] @ w2)
            loss = -(v[:, i] * f).sum() / (3 * H * W)
            w1, w2 = trained(loss, w1, (0,)), trained(loss, w2, (0,))
            parts.append((q[:, i] @ w1) * F.silu(q[:, i] @ w2))
        q, k, v = (part.permute(2, 0, 1)[None] for part in qkv[..., 3 * C :].split(dim, -1))
        w3 = layer.w3[:, None]
        loss = -(v * F.conv2d(k, w3, padding=1, groups=dim)).sum() / (3 * H * W)
        w3 = trained(loss, w3, (2, 3))
        g = F.conv2d(q, w3, padding=1, groups=dim)[0].permute(1, 2, 0).reshape(H * W, dim)
        out = torch.cat((*parts, g), dim=1) @ layer.proj.weight.T + layer.proj.bias
        outs.append(out.reshape(H, W, C))
    return torch.stack(outs)


@BACKENDS
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("size", [(4, 5), (1, 1), (1, 3)])
def test_inner_steps_are_gradient_descent(size, positions, backend):
    layer = make(backend=backend)
    rotary = tables(*size, 12) if positions else None
    x = torch.randn(2, *size, 12, dtype=torch.float64, requires_grad=True)
    out, expected = layer(x, rotary), definition(layer, x, rotary)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    wanted = (x, *layer.parameters())
    grad = torch.randn_like(out)
    for found, exact in zip(
        torch.autograd.grad(out, wanted, grad),
        torch.autograd.grad(expected, wanted, grad),
        strict=True,
    ):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-11)


@BACKENDS
def test_padding_equals_cropping(backend):
    """NaN in padding, too; the queries around the edge find zeros there."""
    layer = make(backend=backend)
    x = torch.randn(2, 5, 6, 12, dtype=torch.float64)
    mask = torch.ones(2, 5, 6, dtype=torch.bool)
    mask[0, :3, :4], mask[1, :5, :2] = False, False
    rotary = tables(5, 6, 12)
    out = layer(x.masked_fill(mask[..., None], torch.nan), rotary, mask)
    for i, (height, width) in enumerate([(3, 4), (5, 2)]):
        alone = layer(x[i : i + 1, :height, :width], tables(height, width, 12))
        torch.testing.assert_close(out[i : i + 1, :height, :width], alone, rtol=1e-10, atol=1e-12)
    assert out.isfinite().all()


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["padding", "zeros"])
def test_norms_of_zero(kind, dtype, backend):
    """Of a sample that is all padding, and of keys and values that are all zero."""
    layer = make(backend=backend).to(dtype)
    x = torch.randn(2, 4, 4, 12, dtype=dtype)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    if kind == "padding":
        mask[0] = True
    else:
        x[0] = 0
        nn.init.zeros_(layer.qkv.bias)
    x.requires_grad_()
    out = layer(x, ops.full_width_rotary_tables(4, 4, 12), mask)
    grads = torch.autograd.grad(out.float().sum(), (x, *layer.parameters()))
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)
    torch.testing.assert_close(out[0], layer.proj.bias.expand(4, 4, 12), rtol=1e-2, atol=1e-2)


@BACKENDS
def test_autocast_keeps_the_step_in_single_precision(backend):
    """Products that float16 no longer holds add up: 4096 tokens of products of 3e-5."""
    layer = make(8, 1, backend=backend).float()
    x = torch.randn(1, 64, 64, 8)
    nn.init.normal_(layer.qkv.weight, std=0.002)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert golden.relative_error(out, expected) < 0.02


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="dim 10 does not divide into 3 heads"):
        TttAttention(10, 3)
    with pytest.raises(ValueError, match="backend"):
        TttAttention(12, 3, backend="fast")


def test_little_is_kept_for_backward():
    """Of what stands between reads and states, nothing but the reads."""
    layer, dim = TttAttention(32, 2), 32
    x = torch.randn(1, 16, 16, dim, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x, ops.full_width_rotary_tables(16, 16, dim))
    parameters = {p.untyped_storage()._cdata for p in layer.parameters()}
    maps = sum(size for key, size in kept.items() if key not in parameters) / x.nbytes
    assert out.requires_grad and maps < 20, maps
