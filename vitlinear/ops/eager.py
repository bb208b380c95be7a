"""The linear-cost formulas in plain, differentiable PyTorch.

What layers run on CPUs, under `torch.compile`, in exported programs and wherever a second or a
forward-mode derivative is wanted. States, normalisers and softmax statistics are float32 (float64
for float64 inputs) whatever the type of the inputs, autocast or not.

Inside this folder heads stand before tokens: q, k, v, out are [B, h, N, D], views of the
[B, N, h, D] that callers hold. F is the width of the feature map, here F = D.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .mechanisms import Mechanism
from .rotary import RotaryTables, rotate, token_table


class LinearAttentionState(NamedTuple):
    """What the sums over tokens leave behind: all that backward needs besides q, k and v.

    Attributes:
        state: S, [B, h, F, D].
        norm: m, [B, h, 1, F].
        query: The mean query qbar, [B, h, 1, F]; None unless the mechanism weighs keys.
        logsumexp: log sum_j exp(s qbar . phi(k_j)), [B, h, 1, 1]; None likewise.
    """

    state: Tensor
    norm: Tensor
    query: Tensor | None = None
    logsumexp: Tensor | None = None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums over tokens are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Keep autocast from rounding the states back to half precision.

    Nothing is entered when autocast is off: the context would otherwise appear as a sub-program
    in exported graphs, and on meta tensors it raises.
    """
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Bound a result that will be cast: float16 then holds its largest number, not infinity."""
    if dtype != torch.float16:
        return x
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit)


class Tokens(NamedTuple):
    """Inputs brought into the form that the formulas work in."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor | None  # [N, D/2, 2]
    valid: Tensor | None  # [B, 1, N, 1], True for tokens that exist
    num_valid: Tensor | int  # number of those, in the accumulation type, [B, 1, 1, 1] or N


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: RotaryTables | None,
    key_padding_mask: Tensor | None,
    contiguous: bool,
) -> Tokens:
    """Heads before tokens, accumulation type, padded tokens zeroed.

    Args:
        q: Queries, [B, N, h, D]; k and v likewise.
        k: Keys.
        v: Values.
        rotary: Tables, or None.
        key_padding_mask: [B, N], or None.
        contiguous: Copy strided inputs at once. Feature maps are two to three times faster on
            contiguous memory, but autograd would then keep the copies.
    """
    dtype = accumulation_dtype(q.dtype)
    # A change of type makes a copy anyway: it might as well be contiguous.
    layout = torch.contiguous_format
    q, k, v = (x.transpose(1, 2).to(dtype, memory_format=layout) for x in (q, k, v))
    if contiguous:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    table = None if rotary is None else token_table(rotary).to(dtype)
    if key_padding_mask is None:
        return Tokens(q, k, v, table, None, q.shape[2])
    valid = ~key_padding_mask[:, None, :, None]
    # Whatever stands in padding, NaN included, must not reach a sum as 0 * NaN.
    q, k, v = (x.masked_fill(~valid, 0) for x in (q, k, v))
    num_valid = valid.sum(2, keepdim=True).clamp(min=1).to(dtype)
    return Tokens(q, k, v, table, valid, num_valid)


def seen_keys(valid: Tensor) -> Tensor:
    """Keys that a softmax runs over, [B, 1, N, 1]: the valid ones.

    Of a sample of padding alone, all: its keys are zeros then, and over no keys softmax is NaN.
    """
    return valid | ~valid.any(dim=2, keepdim=True)


def global_query_logits(query: Tensor, k_features: Tensor, valid: Tensor | None) -> Tensor:
    """Logits of the key weights, s qbar . phi(k_j), as [B, h, N, 1]; padding gets -inf."""
    scale = k_features.shape[-1] ** -0.5
    logits = k_features @ (scale * query).transpose(-1, -2)
    if valid is not None:
        logits = logits.masked_fill(~seen_keys(valid), -torch.inf)
    return logits


def linear_attention_forward(
    tokens: Tokens, mechanism: Mechanism
) -> tuple[Tensor, LinearAttentionState]:
    """Output and state of a linear attention.

    The order of the steps is chosen for what autograd keeps: phi(q), phi(k), the rotated queries,
    the rotated keys and v, one contiguous tensor each, besides the views that it was given. Factors
    that depend on the token multiply features that are kept anyway, before the rotation, which
    keeps only its table. For half-precision inputs all of these are float32, q and k too.

    Returns:
        Output [B, h, N, D] in the accumulation type, and the state.
    """
    q, k, v, table, valid, num_valid = tokens
    phi = mechanism.phi.function
    # Contiguous after phi, not before: phi then keeps the view that it was given, and no matrix
    # product below makes, and keeps, a copy of its own.
    q_features, k_features, v = phi(q).contiguous(), phi(k).contiguous(), v.contiguous()

    query = logsumexp = None
    if mechanism.weighs_keys:
        present = q_features if valid is None else q_features * valid
        query = present.sum(dim=2, keepdim=True) / num_valid
        logits = global_query_logits(query, k_features, valid)
        logsumexp = logits.logsumexp(dim=2, keepdim=True)
        weighted = k_features * (logits - logsumexp).exp()  # w_j / N
        per_token: Tensor | float = 1.0
    else:
        weighted = k_features if valid is None else k_features * valid
        per_token = 1.0 / num_valid

    norm = weighted.sum(dim=2, keepdim=True) * per_token
    state = (rotate(weighted, table).transpose(-1, -2) @ v) * per_token

    normaliser = q_features @ norm.transpose(-1, -2)
    out = rotate(q_features * (normaliser + mechanism.eps).reciprocal(), table) @ state
    if valid is not None:
        out = out.masked_fill(~valid, 0)
    return out, LinearAttentionState(state, norm, query, logsumexp)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: Mechanism,
    rotary: RotaryTables | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Linear attention, [B, N, h, D] in and out; see `vitlinear.ops.linear_attention`."""
    with without_autocast(q):
        keeps_nothing = not torch.is_grad_enabled()
        tokens = prepare(q, k, v, rotary, key_padding_mask, contiguous=keeps_nothing)
        out, _ = linear_attention_forward(tokens, mechanism)
        return saturate(out.transpose(1, 2), q.dtype).to(q.dtype)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: RotaryTables | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Rotary softmax attention on SDPA, [B, N, h, D] in and out.

    Only the rotation runs in the accumulation type; SDPA's fused kernels take the input type and
    accumulate in float32 themselves. They have no second derivative; their plain form, under
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``, has.
    """
    with without_autocast(q):
        return _softmax_attention(q, k, v, rotary, key_padding_mask)


def _softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: RotaryTables | None,
    key_padding_mask: Tensor | None,
) -> Tensor:
    dtype = q.dtype
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if rotary is not None:
        table = token_table(rotary).to(accumulation_dtype(dtype))
        q, k = (rotate(x.to(table.dtype), table).to(dtype) for x in (q, k))
    if key_padding_mask is None:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    padded = key_padding_mask[:, None, :, None]
    q, k, v = (x.masked_fill(padded, 0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_keys(~padded).transpose(-1, -2))
    return out.masked_fill(padded, 0).transpose(1, 2)
