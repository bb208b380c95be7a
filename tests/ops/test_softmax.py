"""Softmax attention of long sequences on CPUs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.onednn import needs_onednn, operators
from vitlinear.ops import softmax_attention
from vitlinear.ops.cpu import products as onednn
from vitlinear.ops.cpu.softmax import MAX_LOGIT, MAX_VALUE, MIN_TOKENS, sdpa, softmax_in_blocks

pytestmark = needs_onednn


@pytest.fixture(autouse=True)
def no_intel(monkeypatch):
    """Wherever this runs."""
    monkeypatch.setattr(onednn, "MKL_KEEPS_UP", False)


def inputs(tokens: int) -> list[torch.Tensor]:
    """q, k, v [B, N, h, D], views of one projection."""
    torch.manual_seed(0)
    return list(torch.randn(2, tokens, 3, 2, 20).unbind(2))


@torch.no_grad()
def test_equals_sdpa_in_double_precision():
    q, k, v = inputs(MIN_TOKENS + 77)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*(x.double() for x in heads)).transpose(1, 2)
    out = softmax_attention(q, k, v)
    assert out.is_contiguous()
    torch.testing.assert_close(out, softmax_in_blocks(*heads), rtol=0, atol=0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1e-30, 1.0, 2.7, 3.0, 30.0])
def test_logits_of_any_size(scale):
    """Without a shift and with one, each head by its own: head 1 has the smaller keys."""
    q, k, v = inputs(MIN_TOKENS)
    k[:, :, 1] *= 0.25
    heads = [x.transpose(1, 2) for x in (scale * q, scale * k, v)]
    expected = F.scaled_dot_product_attention(*(x.double() for x in heads)).transpose(1, 2)
    error = (softmax_in_blocks(*heads) - expected).abs().max()
    # Logits have relative errors, so weights errors in proportion to the logits.
    assert error <= 1e-6 * max(1.0, scale**2)


@torch.no_grad()
def test_only_long_queries_and_keys_pay_for_a_shift():
    heads = [x.transpose(1, 2) for x in inputs(MIN_TOKENS)]
    assert "aten::sub_" not in operators(lambda: softmax_in_blocks(*heads))
    heads[1] = 10 * heads[1]
    assert "aten::sub_" in operators(lambda: softmax_in_blocks(*heads))


@torch.no_grad()
@pytest.mark.parametrize("value", [1.0, MAX_VALUE, 1e30])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_logits_without_a_shift(sign, value):
    q, k, v = (torch.zeros(1, 1, MIN_TOKENS, 4) for _ in range(3))
    q[..., 0] = sign
    k[..., 0] = (1 - 1e-5) * 2 * MAX_LOGIT * math.log(2)  # 2 for sqrt(D)
    v[...] = value
    out = softmax_in_blocks(q, k, v)
    # 512 equal terms round alike.
    torch.testing.assert_close(out, v.transpose(1, 2), rtol=1e-5, atol=0)
    shifted = "aten::sub_" in operators(lambda: softmax_in_blocks(q, k, v))
    assert shifted == (value > MAX_VALUE)


def products(function, *heads: torch.Tensor) -> bool:
    """Whether oneDNN multiplied."""
    return "mkldnn::_linear_pointwise" in operators(lambda: function(*heads))


def test_where_sdpa_stays(monkeypatch):
    heads = [x.transpose(1, 2) for x in inputs(MIN_TOKENS)]
    assert not products(sdpa, *heads)  # gradients are enabled
    with torch.no_grad():
        assert products(sdpa, *heads)
        assert not products(sdpa, *(x[:, :, 1:] for x in heads))
        assert not products(sdpa, *(x.double() for x in heads))
        assert not products(sdpa, *(x.bfloat16() for x in heads))
        monkeypatch.setattr(onednn, "MKL_KEEPS_UP", True)
        assert not products(sdpa, *heads)


@pytest.mark.compile
@torch.no_grad()
def test_one_compiled_program_for_short_and_long():
    compiled = torch.compile(sdpa, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (50, MIN_TOKENS + 77, MIN_TOKENS - 1):
            heads = [x.transpose(1, 2) for x in inputs(tokens)]
            assert products(compiled, *heads) == (tokens >= MIN_TOKENS)
            torch.testing.assert_close(compiled(*heads), sdpa(*heads), rtol=0, atol=0)


@torch.no_grad()
def test_flops_are_those_of_its_products():
    q = inputs(40)[0].transpose(1, 2)
    with FlopCounterMode(display=False) as ours:
        torch.ops.vitlinear.sdpa(q, q, q)
    with FlopCounterMode(display=False) as theirs, sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(q, q, q)
    assert ours.get_total_flops() == theirs.get_total_flops() > 0


@pytest.mark.parametrize("bias", [False, True])
def test_flops_of_pytorchs_attention_on_cpus(bias):
    """Two products, and in backward their four and the logits again."""
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in inputs(40))
    mask = torch.randn(40, 40) if bias else None
    batch, heads, tokens, dim = q.shape
    assert products_of_one_pass(lambda: F.scaled_dot_product_attention(q, k, v, mask)) == (
        2 * 2 * batch * heads * tokens * tokens * dim,
        5 * 2 * batch * heads * tokens * tokens * dim,
    )


def products_of_one_pass(attend) -> tuple[int, int]:
    """Operations that PyTorch's counter finds forward and backward."""
    with FlopCounterMode(display=False) as forward:
        out = attend()
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()
