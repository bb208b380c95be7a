"""Attention whose weights are Taylor polynomials of the exponential: Based, and any order."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor, nn

from vitlinear.layers.band import BANDED

from .description import AttentionDescription, Change, Option
from .grid import Grid
from .mixer import Mixer
from .norms import heads_matrix, rms_norm, unit
from .operator import attend
from .registry import register

Monomials = tuple[list[list[int]], list[float]]


def monomials(dim: int, degree: int) -> Monomials:
    """Monomials of one degree in dim variables, and the roots of their weights in x^degree / m!.

    (q . k)^m / m! = sum over exponents a of q^a k^a / a!, so each factor takes 1 / sqrt(a!).

    Returns:
        For each of the `degree` factors the variable of each monomial; the roots.
    """
    rows = list(combinations_with_replacement(range(dim), degree))
    roots = [math.prod(math.factorial(n) for n in Counter(row).values()) ** -0.5 for row in rows]
    return [list(factor) for factor in zip(*rows, strict=True)], roots


def taylor_features(x: Tensor, order: int, tables: list[Monomials]) -> Tensor:
    """Features whose product is sum_{m <= order} (x . y)^m / m!, [..., D] -> [..., F].

    Args:
        x: Queries or keys, both scaled by s^0.5.
        order: 0 to 3.
        tables: `monomials` of degree 2 to that order, with one feature for each monomial:
            F = 1 + D + D (D + 1) / 2 at order 2. Or nothing for one of each product of channels:
            1 + D + D^2.
    """
    parts = [torch.ones_like(x[..., :1])]
    if order >= 1:
        parts.append(x)
    power = x
    for degree in range(2, order + 1):
        if tables:
            factors, roots = tables[degree - 2]
            power = x[..., factors[0]]
            for factor in factors[1:]:
                power = power * x[..., factor]
            parts.append(power * torch.tensor(roots, dtype=x.dtype, device=x.device))
        else:
            power = (power.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)
            parts.append(power * math.factorial(degree) ** -0.5)
    return torch.cat(parts, dim=-1)


class _Narrow(Mixer):
    """Mixers that take queries and keys to few channels of a head, where there are more.

    Attributes:
        width: Those channels, d'.
    """

    to_q: Tensor | None
    to_k: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        feature_dim: int,
        *,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend=backend, device=device, dtype=dtype)
        self.width = min(feature_dim, self.head_dim)
        narrower = self.width < self.head_dim
        shape = (num_heads, self.head_dim, self.width)
        for name in ("to_q", "to_k"):
            weight = torch.empty(shape, device=device, dtype=dtype) if narrower else None
            self.register_parameter(name, None if weight is None else nn.Parameter(weight))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections that keep lengths on average."""
        for weight in (self.to_q, self.to_k):
            if weight is not None:
                nn.init.normal_(weight, std=self.head_dim**-0.5)

    def narrowed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of d' channels, each scaled by d'^-1/4."""
        if self.to_q is not None and self.to_k is not None:
            q, k = heads_matrix(q, self.to_q), heads_matrix(k, self.to_k)
        return q * self.width**-0.25, k * self.width**-0.25

    def narrowed_definition(self, q: Tensor, k: Tensor) -> Tensor:
        """x = s q . k of all pairs of tokens, [B, h, N, N]."""
        if self.to_q is not None and self.to_k is not None:
            q = torch.einsum("bnhd,hde->bnhe", q, self.to_q)
            k = torch.einsum("bnhd,hde->bnhe", k, self.to_k)
        return torch.einsum("bnhd,bmhd->bhnm", q, k) * self.width**-0.5


@register(
    AttentionDescription(
        name="based",
        formula="(1 + x + x^2 / 2) v / (1 + x + x^2 / 2), x = q k^T / sqrt(d'), d' = 16",
        paper="arXiv:2402.18668",
        title="Simple linear attention language models balance the recall-throughput tradeoff",
        year=2024,
        cost="2 N F D",
        state="F (D + 1)",
        order="free",
        positive=True,
        rows_sum_to_one=True,
        query_magnitude=True,
        injective=False,
        backends=("eager", "library", "triton"),
        options={
            "feature_dim": Option(16, "channels that queries and keys are taken to", 1, 64),
            "expansion": Option(
                "symmetric",
                "153 features for the 16 channels, or 273 with each product twice",
                choices=("symmetric", "full"),
            ),
        },
        origin="Non-causal. Queries and keys of more channels meet a learned matrix for each head; "
        "the normaliser has the operator's 1e-6 where the paper has 1e-12 (it is at least 1/2).",
    )
)
class Based(_Narrow):
    """Attention with the Taylor polynomial of order 2, which is at least 1/2.

    Source: arXiv:2402.18668, section 4; the two sizes of the map are those of the released code
    (full) and of flash-linear-attention (symmetric). They give the same numbers.
    """

    row_rule = BANDED

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        feature_dim: int = 16,
        expansion: str = "symmetric",
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, feature_dim, **kwargs)
        self.tables = [monomials(self.width, 2)] if expansion == "symmetric" else []

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        q, k = (taylor_features(x, 2, self.tables) for x in self.narrowed(q, k))
        return attend(q, k, v, "features", grid, backend=self.backend)

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """The quadratic form; see `Mixer.definition`."""
        product = self.narrowed_definition(q, k)
        weights = 1 + product + product**2 / 2
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6 * q.shape[1])
        return torch.einsum("bhnm,bmhd->bnhd", weights, v)


@register(
    AttentionDescription(
        name="taylor",
        formula="norm(t v), or t v / sum t; t = sum_{m <= order} x^m / m!, x = q k^T / sqrt(d')",
        paper="arXiv:2507.23632",
        title="On the Expressiveness of Softmax Attention: A Recurrent Neural Network Perspective",
        year=2025,
        cost="2 N F D",
        state="F (D + 1)",
        order="free",
        positive=True,
        rows_sum_to_one=False,
        query_magnitude=True,
        injective=False,
        backends=("eager", "library", "triton"),
        options={
            "degree": Option(2, "order of the polynomial", 0, 3),
            "norm": Option(
                "l2",
                "of outputs, or the sum of weights",
                choices=("l2", "rms", "sum"),
            ),
            "feature_dim": Option(16, "channels that queries and keys are taken to", 1, 64),
        },
        changes=(
            Change("degree", (0,), {"query_magnitude": False}),
            Change("degree", (1, 3), {"positive": False}),
            Change("norm", ("sum",), {"rows_sum_to_one": True}),
        ),
        origin="Non-causal. Sums of odd order can be 0: then their magnitude is at least 1e-6, and "
        "outputs can be large.",
    )
)
class Taylor(_Narrow):
    """Attention with the Taylor polynomial of the exponential, order 0 to 3, and a choice of norm.

    Order m adds a state of m-fold products of keys. The sum of the weights divides, or a norm of
    the output does in its place, as the paper finds to serve as well. Order 1 with the sum is
    linear attention with the map [1, x]. Weights of even order are positive, and with the sum add
    up to 1.
    """

    row_rule = BANDED

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        degree: int = 2,
        norm: str = "l2",
        feature_dim: int = 16,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, feature_dim, **kwargs)
        self.degree = degree
        self.norm = norm
        self.tables = [monomials(self.width, m) for m in range(2, degree + 1)]

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        q, k = (taylor_features(x, self.degree, self.tables) for x in self.narrowed(q, k))
        row = "signed_features" if self.norm == "sum" else "identity"
        out = attend(q, k, v, row, grid, backend=self.backend)
        if self.norm == "l2":
            return unit(out)
        return rms_norm(out) if self.norm == "rms" else out

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """The quadratic form; see `Mixer.definition`."""
        product = self.narrowed_definition(q, k)
        terms = [product**m / math.factorial(m) for m in range(self.degree + 1)]
        weights = torch.stack(terms).sum(0) / q.shape[1]
        out = torch.einsum("bhnm,bmhd->bnhd", weights, v)
        if self.norm == "l2":
            return nn.functional.normalize(out, dim=-1)
        if self.norm == "rms":
            return out * (out.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return out / weights.sum(-1).transpose(1, 2).unsqueeze(-1)
