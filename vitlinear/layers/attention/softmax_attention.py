"""Softmax attention between projections, without parameters of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear.ops.backend import check_backend

from ..band import BANDED, band_in_use
from .band_attention import gather_keys


class SoftmaxAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v on SDPA: no parameters, a place for reports to look at."""

    attn_type = "softmax"
    row_rule = BANDED

    def __init__(self, num_heads: int, head_dim: int, backend: str = "auto") -> None:
        """Make the attention.

        Args:
            num_heads: h.
            head_dim: D.
            backend: One of `vitlinear.ops.BACKENDS`; softmax runs on SDPA whatever it is.

        Raises:
            ValueError: The backend is unknown.
        """
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.backend = check_backend(backend)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            q: Queries, [B, N, h, D], any strides; k and v likewise.
            k: Keys.
            v: Values.
            mask: Broadcastable to [B, h, N, N]: bool, True for keys that count, or a term of the
                logits. A query needs at least one key.

        Returns:
            [B, N, h * D].
        """
        if not torch.jit.is_scripting():
            band = band_in_use()
            if band is not None:
                # A mask is one of keys here, [B, 1, 1, N].
                keys = None if mask is None else mask[:, 0, 0]
                k, v, keys = gather_keys(band, k, v, keys)
                mask = None if keys is None else keys[:, None, None]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        # Two conditions, for TorchScript to leave out what it cannot read.
        if not torch.jit.is_scripting():  # noqa: SIM102
            if torch.onnx.is_in_onnx_export():
                return written_out(q, k, v, mask).transpose(1, 2).flatten(2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        if not torch.jit.is_scripting() and torch.compiler.is_compiling():
            # Its strides depend on what SDPA becomes: a view could be wrong after a translation.
            out = out.clone(memory_format=torch.contiguous_format)
        return out.flatten(2)


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """SDPA in the steps that ONNX has.

    SDPA asks whether a mask is one for all images, with the answer of `known_layout`.

    Args:
        q: [B, h, N, D]; k and v likewise.
        k: Keys.
        v: Values.
        mask: As `SoftmaxAttention` takes it.

    Returns:
        [B, h, N, D].
    """
    logits = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        logits = logits + mask
    return logits.softmax(-1) @ v
