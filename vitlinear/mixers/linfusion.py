"""LinFusion: linear attention whose queries and keys a small network corrects."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from torch import Tensor, nn

from vitlinear.layers.band import BANDED
from vitlinear.layers.linear import Linear

from .description import AttentionDescription, Option
from .grid import Grid
from .mixer import Mixer
from .operator import attend
from .registry import register


@register(
    AttentionDescription(
        name="linfusion",
        formula="f(q + F_q(x)) S / (f(q + F_q(x)) m + 1e-4), f = elu + 1, keys likewise",
        paper="arXiv:2409.02097",
        title="LinFusion: 1 GPU, 1 Minute, 16K Image",
        year=2024,
        cost="2 N D^2",
        state="D (D + 1)",
        order="free",
        positive=True,
        rows_sum_to_one=True,
        query_magnitude=True,
        injective=False,
        backends=("eager", "library", "triton"),
        options={"hidden_dim": Option(64, "channels inside of F", 1)},
        needs_input=True,
        origin="The paper corrects the input of the projection, W (x + F(x)); here F ends behind "
        "the projection, which is the same function with W inside of F.",
    )
)
class LinFusion(Mixer):
    """Generalised linear attention: sums are means, so that the resolution may change.

    F is Linear, LayerNorm, LeakyReLU, Linear; the last one begins at zero, with which attention
    begins as plain linear attention of a trained model's queries and keys. Source: the released
    code of arXiv:2409.02097.
    """

    row_rule = BANDED
    resets_parts = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        hidden_dim: int = 64,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend=backend, device=device, dtype=dtype)
        self.correct_q, self.correct_k = (
            nn.Sequential(
                Linear(dim, hidden_dim, device=device, dtype=dtype),
                LayerNorm(hidden_dim, device=device, dtype=dtype),
                nn.LeakyReLU(),
                Linear(hidden_dim, dim, device=device, dtype=dtype),
            )
            for _ in range(2)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """No correction."""
        for network in (self.correct_q, self.correct_k):
            for parameter in network[-1].parameters():
                nn.init.zeros_(parameter)

    def from_input(self, x: Tensor, grid: Grid) -> Tensor | None:
        """Corrections of queries and keys, [B, N, 2 C]."""
        return torch.cat((self.correct_q(x), self.correct_k(x)), dim=-1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        assert extra is not None
        # Taken apart as projections are: a gradient without a layout of its own is no view.
        changes = extra.to(q.dtype).unflatten(-1, (2, *q.shape[2:])).unbind(2)
        q, k = q + changes[0], k + changes[1]
        return attend(q, k, v, "elu_smoothed", grid, backend=self.backend)

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """The quadratic form; see `Mixer.definition`."""
        assert x is not None
        q = F.elu(q + self.correct_q(x).reshape(q.shape)) + 1
        k = F.elu(k + self.correct_k(x).reshape(k.shape)) + 1
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[1]
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-4)
        return torch.einsum("bhnm,bmhd->bnhd", weights, v)
