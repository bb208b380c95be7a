"""Softmax attention of long sequences on CPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.onednn import needs_onednn, operators
from vitlinear.ops import softmax_attention
from vitlinear.ops.softmax import MIN_TOKENS, sdpa, softmax_in_blocks

pytestmark = needs_onednn


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
    # Logits of 1e6: their exponentials fit no number.
    large = softmax_attention(1e3 * q, 1e3 * k, v)
    assert large.isfinite().all()


def products(function, *heads: torch.Tensor) -> bool:
    """Whether oneDNN multiplied."""
    return "mkldnn::_linear_pointwise" in operators(lambda: function(*heads))


def test_where_sdpa_stays():
    heads = [x.transpose(1, 2) for x in inputs(MIN_TOKENS)]
    assert not products(sdpa, *heads)  # gradients are enabled
    with torch.no_grad():
        assert products(sdpa, *heads)
        assert not products(sdpa, *(x[:, :, 1:] for x in heads))
        assert not products(sdpa, *(x.double() for x in heads))
        assert not products(sdpa, *(x.bfloat16() for x in heads))


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
