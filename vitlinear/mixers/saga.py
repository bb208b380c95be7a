"""SAGA: linear attention whose keys and values have gates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlinear.layers.band import BANDED
from vitlinear.layers.linear import Linear

from .description import AttentionDescription, Change, Option
from .grid import Grid
from .mixer import Mixer
from .operator import attend
from .registry import register


@register(
    AttentionDescription(
        name="saga",
        formula="f(q) S / (f(q) m), S = mean (a f(k)) (b v)^T, m = mean a f(k), f = elu + 1",
        paper="arXiv:2509.12817",
        title="SAGA: Selective Adaptive Gating for Efficient and Expressive Linear Attention",
        year=2025,
        cost="2 N D^2",
        state="D (D + 1)",
        order="free",
        positive=True,
        rows_sum_to_one=False,
        query_magnitude=True,
        injective=False,
        backends=("eager", "library", "triton"),
        options={
            "gates": Option(
                "both", "which of keys and values have one", choices=("both", "keys", "values")
            ),
        },
        changes=(Change("gates", ("keys",), {"rows_sum_to_one": True}),),
        needs_input=True,
        origin="From general knowledge of the paper: gates by one linear layer of the input, and "
        "the gated keys in the normaliser too.",
    )
)
class Saga(Mixer):
    """A gate of each token for every entry of k v^T, as the product of one for k and one for v.

    A gate of a matrix of D x D for each token is a_j b_j^T with a_j = sigmoid(W_a x_j) and
    b_j = sigmoid(W_b x_j): no matrix is made, and the state stays one sum. Gates of the keys are
    in the normaliser: with ``keys`` alone weights add up to 1.
    """

    row_rule = BANDED

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        gates: str = "both",
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend=backend, device=device, dtype=dtype)
        self.gates = gates
        self.gate = Linear(dim, (2 if gates == "both" else 1) * dim, device=device, dtype=dtype)

    def from_input(self, x: Tensor, grid: Grid) -> Tensor | None:
        """Logits of the gates, [B, N, C] or [B, N, 2 C]."""
        return self.gate(x)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        assert extra is not None
        gates = [x.sigmoid() for x in extra.to(q.dtype).split(self.dim, dim=-1)]
        row, of_keys = "elu", None
        if self.gates != "values":
            row, of_keys = "gated_elu", gates[0].reshape(k.shape)
        if self.gates != "keys":
            v = v * gates[-1].reshape(v.shape)
        return attend(q, k, v, row, grid, key_weights=of_keys, backend=self.backend)

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """One gated matrix for each token; see `Mixer.definition`."""
        assert x is not None
        q, k = F.elu(q) + 1, F.elu(k) + 1
        logits = (x @ self.gate.weight.T + self.gate.bias).split(self.dim, dim=-1)
        of_keys = of_values = torch.ones_like(k)
        if self.gates != "values":
            of_keys = logits[0].sigmoid().reshape(k.shape)
        if self.gates != "keys":
            of_values = logits[-1].sigmoid().reshape(k.shape)
        gates = torch.einsum("bnhd,bnhe->bnhde", of_keys, of_values)
        state = (gates * torch.einsum("bnhd,bnhe->bnhde", k, v)).sum(1)
        norm = (of_keys * k).sum(1)
        out = torch.einsum("bnhd,bhde->bnhe", q, state)
        return out / (torch.einsum("bnhd,bhd->bnh", q, norm) + 1e-6 * q.shape[1]).unsqueeze(-1)
