"""Numbers of valid tokens in the place of a padding mask."""

from __future__ import annotations

import pytest
import torch

from vitlinear import ops


def test_lengths_of_other_batches_are_refused():
    x = torch.randn(2, 6, 1, 8)
    with pytest.raises(ValueError, match=r"key_padding_mask must be \[B, N\] = \(2, 6\)"):
        ops.linear_attention(x, x, x, key_padding_mask=torch.tensor([1, 2, 9]))


def test_lengths_under_vmap():
    x, lengths = torch.randn(3, 2, 6, 1, 8), torch.tensor([[0, 6], [2, 3], [5, 1]])

    def attend(x, lengths):
        return ops.linear_attention(x, x, x, key_padding_mask=lengths)

    expected = attend(x.flatten(0, 1), lengths.flatten()).unflatten(0, (3, 2))
    torch.testing.assert_close(torch.func.vmap(attend)(x, lengths), expected)


@pytest.mark.parametrize("length", [7, -1])
def test_lengths_that_tokens_cannot_have_are_refused(length):
    x, lengths = torch.randn(2, 6, 1, 8), torch.tensor([0, length])
    state = ops.linear_attention_state(x, x, key_padding_mask=torch.tensor([0, 6]))
    for call in (
        lambda: ops.linear_attention(x, x, x, key_padding_mask=lengths),
        lambda: ops.softmax_attention(x, x, x, key_padding_mask=lengths),
        lambda: ops.linear_attention_state(x, x, key_padding_mask=lengths),
        lambda: ops.read_linear_attention_state(x, state, key_padding_mask=lengths),
    ):
        with pytest.raises(ValueError, match=rf"from 0 to 6, .* got {length} for image 1"):
            call()
