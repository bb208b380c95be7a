"""Flowformer: linear attention in which tokens compete for a flow that is conserved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitlinear.layers.band import BANDED

from .description import AttentionDescription, Option
from .grid import Grid
from .mixer import Mixer
from .operator import attend
from .registry import register

EPS = 1e-6  # inside of every product of sums, as released


@register(
    AttentionDescription(
        name="flowformer",
        formula="sigmoid(I'_i) (sigmoid(q_i) / I_i) sum_j sigmoid(k_j)^T N softmax_j(O'_j) v_j",
        paper="arXiv:2202.06258",
        title="Flowformer: Linearizing Transformers with Conservation Flows",
        year=2022,
        cost="2 N D^2",
        state="D (D + 4)",
        order="free",
        positive=True,
        rows_sum_to_one=False,
        query_magnitude=True,
        injective=False,
        backends=("eager", "library", "triton"),
        options={
            "clamp": Option(True, "bound the competing flows to -1..1, as released"),
        },
        origin="Non-causal. Without the clamp, keys above the average compete as well.",
    )
)
class Flowformer(Mixer):
    """Flow attention: incoming flow normalises, outgoing flow competes, allocation gates.

    With f = sigmoid(q), g = sigmoid(k) and eps = 1e-6 added to both factors of each product::

        I_i = f_i . sum_j g_j            O_j = g_j . sum_i f_i
        I'_i = f_i . sum_j g_j / O_j     O'_j = clamp(g_j . sum_i f_i / I_i, -1, 1)
        out_i = sigmoid(I'_i) (f_i / I_i) . sum_j g_j N softmax_j(O'_j) v_j^T

    The sum of g_j . sum_i f_i / I_i over j is the number of queries, so its mean is 1 and the
    released clamp ties all keys above the mean. Source: the released code of arXiv:2202.06258.
    """

    row_rule = BANDED

    def __init__(self, dim: int, num_heads: int, *, clamp: bool = True, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        self.clamp = clamp

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        f, g = grid.hide(q.sigmoid()), grid.hide(k.sigmoid())

        def flow(x: Tensor, others: Tensor) -> Tensor:
            return ((x + EPS) * (grid.sum(others) + EPS)).sum(-1, keepdim=True)

        incoming, outgoing = flow(f, g), flow(g, f)
        conserved_in, conserved_out = flow(f, g / outgoing), flow(g, f / incoming)
        if self.clamp:
            conserved_out = conserved_out.clamp(-1.0, 1.0)
        count = grid.number(q)
        weights = count * grid.token_softmax(conserved_out)
        f = f * (count * conserved_in.sigmoid() / incoming)
        return attend(f, g, v, "weighted_identity", grid, key_weights=weights, backend=self.backend)

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """The matrix of flows between all pairs of tokens; see `Mixer.definition`."""
        f, g = q.sigmoid(), k.sigmoid()

        def flow(x: Tensor, others: Tensor) -> Tensor:
            pairs = torch.einsum("bnhd,bmhd->bhnm", x + EPS, others).sum(-1)
            return pairs + EPS * (x + EPS).sum(-1).transpose(1, 2)

        def heads_last(x: Tensor) -> Tensor:
            return x.transpose(1, 2).unsqueeze(-1)

        incoming, outgoing = flow(f, g), flow(g, f)
        conserved_in = flow(f, g / heads_last(outgoing))
        conserved_out = flow(g, f / heads_last(incoming))
        if self.clamp:
            conserved_out = conserved_out.clamp(-1, 1)
        weights = torch.einsum("bnhd,bmhd->bhnm", f, g) / incoming.unsqueeze(-1)
        weights = weights * q.shape[1] * conserved_out.softmax(-1).unsqueeze(-2)
        weights = weights * conserved_in.sigmoid().unsqueeze(-1)
        return torch.einsum("bhnm,bmhd->bnhd", weights, v)
