"""Hedgehog: learned feature maps that are to be spiky and monotonic as softmax is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlinear.layers.band import BANDED, band_in_use

from .description import AttentionDescription, Option
from .grid import Grid
from .mixer import Mixer
from .norms import heads_matrix, identity_matrices
from .operator import attend
from .registry import register

MAPS = ("exp", "softmax", "exp_max", "joint_softmax")


def softmax_halves_definition(x: Tensor, weight: Tensor) -> Tensor:
    """[softmax(W x); softmax(-W x)] of each head, for definitions: x [B, N, h, D], W [h, D, D]."""
    return _halves(torch.einsum("bnhd,hde->bnhe", x, weight))


def _halves(u: Tensor) -> Tensor:
    return torch.cat((u.softmax(-1), (-u).softmax(-1)), dim=-1)


def _largest(a: tuple[Tensor], b: tuple[Tensor]) -> tuple[Tensor]:
    return (torch.maximum(a[0], b[0]),)


@register(
    AttentionDescription(
        name="hedgehog",
        formula="f(q) S / (f(q) m), f(x) = [exp(W x); exp(-W x)], or the same by softmax",
        paper="arXiv:2402.04347",
        title="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
        year=2024,
        cost="4 N D^2 + 2 N D^2",
        state="2 D (D + 1)",
        order="free",
        positive=True,
        rows_sum_to_one=True,
        query_magnitude=True,
        injective=False,
        backends=("eager", "library", "triton"),
        options={
            "map": Option("softmax", "the published feature maps", choices=MAPS),
            "bias": Option(False, "whether W x has a bias"),
        },
        origin="Non-causal. Implementations differ, so each map has a name: see `Hedgehog`.",
    )
)
class Hedgehog(Mixer):
    """Linear attention with a trained map of each head, W the identity at first.

    With u = W x + b, W of each head and another one for queries than for keys:

    - ``exp``: [exp(u); exp(-u)], as the paper writes it. Queries are scaled by the greatest
      feature of their token and keys by that of all tokens, which divides out.
    - ``softmax``: [softmax(u); softmax(-u)] over channels, the ``softmax_dim`` of LoLCATs' code.
    - ``exp_max``: [exp(u - max u); exp(-u + min u)], the ``exp_dim`` of LoLCATs' code. Its shift
      differs between the halves and does not divide out: it weighs keys.
    - ``joint_softmax``: one softmax over [2 u; -2 u] with W shared by the heads, as in
      flash-linear-attention.
    """

    row_rule = BANDED

    query_weight: Tensor
    key_weight: Tensor
    query_bias: Tensor | None
    key_bias: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        map: str = "softmax",
        bias: bool = False,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend=backend, device=device, dtype=dtype)
        self.map = map
        heads, width = 1 if map == "joint_softmax" else num_heads, self.head_dim
        for name in ("query", "key"):
            weight = torch.empty(heads, width, width, device=device, dtype=dtype)
            setattr(self, f"{name}_weight", nn.Parameter(weight))
            shift = torch.empty(heads, width, device=device, dtype=dtype) if bias else None
            self.register_parameter(f"{name}_bias", None if shift is None else nn.Parameter(shift))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The identity."""
        for weight in (self.query_weight, self.key_weight):
            identity_matrices(weight)
        for bias in (self.query_bias, self.key_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        q = heads_matrix(q, self.query_weight)
        k = heads_matrix(k, self.key_weight)
        if self.query_bias is not None and self.key_bias is not None:
            q, k = q + self.query_bias.to(q.dtype), k + self.key_bias.to(k.dtype)
        row = "softmax_halves"
        if self.map != "softmax":
            q, k, row = self.features(q, (3,)), self.features(grid.hide(k), (1, 3)), "features"
        return attend(q, k, v, row, grid, backend=self.backend)

    def features(self, u: Tensor, alike: tuple[int, ...]) -> Tensor:
        """Features of u by a map that is none of the operator's, [B, N, h, D] -> [B, N, h, 2 D].

        Args:
            u: After W and b.
            alike: Axes over which a scale of ``exp`` divides out.
        """
        if self.map == "joint_softmax":
            return torch.cat((2 * u, -2 * u), dim=-1).softmax(-1)
        if self.map == "exp_max":
            above, below = u.amax(-1, keepdim=True), u.amin(-1, keepdim=True)
            return torch.cat((u - above, below - u), dim=-1).exp()
        size, band = u.detach().abs(), band_in_use()
        if band is not None and 1 in alike:
            own = band.own_tokens(size).amax(alike, keepdim=True)
            (shift,) = band.merge((own,), _largest)
        else:
            shift = size.amax(alike, keepdim=True)
        return torch.cat((u - shift, -u - shift), dim=-1).exp()

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """The quadratic form; see `Mixer.definition`."""
        heads = (q.shape[2], -1, -1)
        q = torch.einsum("bnhd,hde->bnhe", q, self.query_weight.expand(heads))
        k = torch.einsum("bnhd,hde->bnhe", k, self.key_weight.expand(heads))
        if self.query_bias is not None and self.key_bias is not None:
            q, k = q + self.query_bias, k + self.key_bias
        if self.map == "exp":
            # The operator adds 1e-6 to a normaliser whose greatest features are 1.
            scale_q = q.detach().abs().amax(3, keepdim=True)
            scale_k = k.detach().abs().amax((1, 3), keepdim=True)
            q = torch.cat((q.exp(), (-q).exp()), dim=-1) / scale_q.exp()
            k = torch.cat((k.exp(), (-k).exp()), dim=-1) / scale_k.exp()
        elif self.map == "softmax":
            q, k = _halves(q), _halves(k)
        else:
            q, k = self.features(q, ()), self.features(k, ())
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6 * q.shape[1])
        return torch.einsum("bhnm,bmhd->bnhd", weights, v)
