"""LAWCAT: linear attention behind convolutions of queries and keys that begin as the identity."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlinear.layers.band import BANDED
from vitlinear.layers.conv.depthwise_conv import DepthwiseConv

from .convolution import convolved_tokens, naive_convolution
from .description import AttentionDescription
from .grid import Grid
from .hedgehog import softmax_halves_definition
from .mixer import Mixer
from .norms import heads_matrix, identity_matrices
from .operator import attend
from .registry import register


@register(
    AttentionDescription(
        name="lawcat",
        formula="f(conv(q)) S / (f(conv(q)) m), f(x) = [softmax(W x); softmax(-W x)]",
        paper="github.com/zeyuliu1037/LAWCAT",
        title="LAWCAT: Efficient Distillation from Quadratic to Linear Attention with Convolution "
        "across Tokens for Long Context Modeling",
        year=2025,
        cost="4 N D^2 + 2 N D^2",
        state="2 D (D + 1)",
        order="local",
        positive=True,
        rows_sum_to_one=True,
        query_magnitude=True,
        injective=False,
        backends=("eager", "library", "triton"),
        origin="Non-causal: a 3 x 3 depthwise convolution of the map in the place of one over the "
        "last 4 tokens, and no decay.",
    )
)
class Lawcat(Mixer):
    """Depthwise 3 x 3 convolutions on the maps of queries and keys, then normalised attention.

    The middle tap begins at 1 and the others at 0.001, without bias or nonlinearity, so a trained
    model's attention changes little at first. The map is LoLCATs' softmax map with one matrix for
    queries and one for keys, which the published configuration builds on.
    """

    row_rule = BANDED
    resets_parts = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend=backend, device=device, dtype=dtype)
        self.conv_q, self.conv_k = (
            DepthwiseConv(dim, 3, device=device, dtype=dtype) for _ in range(2)
        )
        shape = (num_heads, self.head_dim, self.head_dim)
        self.query_weight, self.key_weight = (
            nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for _ in range(2)
        )
        for conv in (self.conv_q, self.conv_k):
            conv.bias = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Nearly the identity."""
        for conv in (self.conv_q, self.conv_k):
            nn.init.constant_(conv.weight, 1e-3)
            with torch.no_grad():
                conv.weight[..., 1, 1] = 1
        for weight in (self.query_weight, self.key_weight):
            identity_matrices(weight)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        q, k = convolved_tokens(self.conv_q, q, grid), convolved_tokens(self.conv_k, k, grid)
        q, k = heads_matrix(q, self.query_weight), heads_matrix(k, self.key_weight)
        return attend(q, k, v, "softmax_halves", grid, backend=self.backend)

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """The quadratic form; see `Mixer.definition`."""
        features = []
        for tokens, conv, weight in (
            (q, self.conv_q, self.query_weight),
            (k, self.conv_k, self.key_weight),
        ):
            prefix, image = grid.split(tokens)
            tokens = grid.join(prefix, naive_convolution(conv, image))
            features.append(softmax_halves_definition(tokens, weight))
        weights = torch.einsum("bnhd,bmhd->bhnm", *features)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6 * q.shape[1])
        return torch.einsum("bhnm,bmhd->bnhd", weights, v)
