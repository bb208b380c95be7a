"""Softmax attention of long sequences on CPUs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitlinear.ops import softmax_attention
from vitlinear.ops.linear import onednn_available
from vitlinear.ops.softmax import MIN_TOKENS, runs_in_blocks, softmax_in_blocks

pytestmark = pytest.mark.skipif(not onednn_available(), reason="this PyTorch has no oneDNN")


def inputs(tokens: int) -> list[torch.Tensor]:
    """q, k, v [B, N, h, D], views of one projection."""
    torch.manual_seed(0)
    return list(torch.randn(2, tokens, 3, 2, 20).unbind(2))


@torch.no_grad()
def test_equals_sdpa_in_double_precision():
    q, k, v = inputs(MIN_TOKENS + 77)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    assert runs_in_blocks(*heads)
    expected = F.scaled_dot_product_attention(*(x.double() for x in heads)).transpose(1, 2)
    out = softmax_attention(q, k, v)
    assert out.is_contiguous()
    torch.testing.assert_close(out, softmax_in_blocks(*heads), rtol=0, atol=0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    # Logits of 1e6: their exponentials fit no number.
    large = softmax_attention(1e3 * q, 1e3 * k, v)
    assert large.isfinite().all()


def test_where_sdpa_stays():
    heads = [x.transpose(1, 2) for x in inputs(MIN_TOKENS)]
    assert not runs_in_blocks(*heads)  # gradients are enabled
    with torch.no_grad():
        assert runs_in_blocks(*heads)
        assert not runs_in_blocks(*(x[:, :, 1:] for x in heads))
        assert not runs_in_blocks(*(x.double() for x in heads))
        assert not runs_in_blocks(*(x.bfloat16() for x in heads))
