"""TransNormer's attentions: one without a normaliser, one in blocks; and TransNormerLLM's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear.layers.band import BANDED
from vitlinear.layers.linear import Linear

from .decay import distances, slopes, two_sided_sums
from .description import AttentionDescription, Change, Option
from .grid import Grid
from .grid_windows import GridWindows, hidden_scores, prefix_attention, same_window
from .mixer import Mixer
from .norms import rms_norm, rms_norm_definition
from .operator import attend
from .registry import register

BACKENDS = ("eager", "library", "triton")
TRANSNORMER = "The Devil in Linear Transformer"


class _HeadNorm(Mixer):
    """Mixers whose output goes through an RMS norm of each head with a weight of each channel."""

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
        shape = (num_heads, self.head_dim)
        self.norm_weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A norm of weight 1, where there is one."""
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)


@register(
    AttentionDescription(
        name="norm_attention",
        formula="RMSNorm(phi(q) S), S = mean phi(k) v^T, phi = elu + 1 or elu",
        paper="arXiv:2210.10340",
        title=TRANSNORMER,
        year=2022,
        cost="2 N D^2",
        state="D^2",
        order="free",
        positive=True,
        rows_sum_to_one=False,
        query_magnitude=True,
        injective=False,
        backends=BACKENDS,
        options={
            "map": Option("elu+1", "of T2, or of T1 (elu)", choices=("elu+1", "elu")),
        },
        changes=(Change("map", ("elu",), {"positive": False}),),
        origin="Non-causal. The state is a mean, which the norm after it divides out.",
    )
)
class NormAttention(_HeadNorm):
    """Linear attention without a division: a norm of the output takes its place."""

    row_rule = BANDED

    def __init__(self, dim: int, num_heads: int, *, map: str = "elu+1", **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        self.map = map

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        row = "elu_sum"
        if self.map == "elu":
            q, k, row = F.elu(q), F.elu(k), "identity"
        out = attend(q, k, v, row, grid, backend=self.backend)
        return rms_norm(out, self.norm_weight)

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """The quadratic form; see `Mixer.definition`."""
        shift = 1 if self.map == "elu+1" else 0
        weights = torch.einsum("bnhd,bmhd->bhnm", F.elu(q) + shift, F.elu(k) + shift)
        out = torch.einsum("bhnm,bmhd->bnhd", weights / q.shape[1], v)
        return rms_norm_definition(out, self.norm_weight)


@register(
    AttentionDescription(
        name="diag_attention",
        formula="softmax(s q k^T) v inside of windows, or RMSNorm(ReLU(s q k^T) v)",
        paper="arXiv:2210.10340",
        title=TRANSNORMER,
        year=2022,
        cost="2 N w^2 D, w the side of a window",
        state="0",
        order="local",
        positive=True,
        rows_sum_to_one=True,
        query_magnitude=True,
        injective=True,
        options={
            "window": Option(8, "side of a window", 1, 64),
            "scores": Option(
                "softmax", "of T2, or of T1 (relu, with a norm)", choices=("softmax", "relu")
            ),
        },
        changes=(
            # The norm takes the length of the query away.
            Change(
                "scores",
                ("relu",),
                {"rows_sum_to_one": False, "query_magnitude": False, "injective": False},
            ),
        ),
        origin="Windows of 8 x 8 for the paper's blocks of 64 tokens. Tokens before the map see "
        "all tokens, and all tokens see them.",
    )
)
class DiagAttention(_HeadNorm):
    """Exact attention inside of windows, for the early layers."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 8,
        scores: str = "softmax",
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, **kwargs)
        self.window = window
        self.scores = scores
        if scores == "softmax":
            self.norm_weight = None  # type: ignore[assignment]

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        windows, relu = GridWindows(grid, self.window), self.scores == "relu"
        scores = windows.cut(q).transpose(2, 3) @ windows.keys(k).transpose(-1, -2)
        scores = hidden_scores(scores * self.head_dim**-0.5, windows.seen(q))
        weights = scores.relu() if relu else scores.softmax(-1)
        out = windows.join((weights @ windows.keys(v)).transpose(2, 3))
        prefix = grid.num_prefix_tokens
        if prefix and relu:
            scores = torch.einsum("bnhd,bmhd->bhnm", q[:, :prefix], k) * self.head_dim**-0.5
            first = torch.einsum("bhnm,bmhd->bnhd", scores.relu(), v)
            out = torch.cat((first, out), dim=1)
        elif prefix:
            out = torch.cat((prefix_attention(q, k, v, grid), out), dim=1)
        return rms_norm(out, self.norm_weight) if relu else out

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """The masked quadratic form; see `Mixer.definition`."""
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * self.head_dim**-0.5
        scores = scores.masked_fill(~same_window(grid, self.window, q.device), -torch.inf)
        weights = scores.relu() if self.scores == "relu" else scores.softmax(-1)
        out = torch.einsum("bhnm,bmhd->bnhd", weights, v)
        return rms_norm_definition(out, self.norm_weight) if self.scores == "relu" else out


@register(
    AttentionDescription(
        name="transnormer",
        formula="SRMSNorm(sum_j g^|i - j| SiLU(q_i) SiLU(k_j)^T v_j) sigmoid(W2 W1 x_i)",
        paper="arXiv:2307.14995",
        title="TransNormerLLM: A Faster and Better Large Language Model with Improved TransNormer",
        year=2023,
        cost="2 N D^2; with decay N D^2 (16 + H / 16 + W / 16), and N D^2 numbers of memory",
        changes=(Change("decay", ("two_sided",), {"order": "local", "backends": ("eager",)}),),
        state="D^2",
        order="free",
        positive=False,
        rows_sum_to_one=False,
        query_magnitude=True,
        injective=False,
        backends=BACKENDS,
        options={
            "decay": Option("none", "with distance on the map", choices=("none", "two_sided")),
            "gate": Option(True, "whether a gate of low rank multiplies the output"),
            "silu_values": Option(False, "whether values go through SiLU, as in the code of TNL"),
        },
        needs_input=True,
        origin="The non-causal reading of TransNormerLLM and Lightning Attention. Decay goes by "
        "|row - row'| + |column - column'|, as a pass over rows and one over columns; tokens "
        "before the map have no distance. With decay the order of the tokens matters.",
    )
)
class TransNormer(Mixer):
    """Lightning attention without a direction: SiLU maps, a norm, a gate, and decay by choice.

    The norm x / rms(x) has no weight and runs over all channels of a token. The gate is
    sigmoid(W2 W1 x) with D channels between. Of head a = 1..h, g = exp(-2^(-8 a / h)): the slopes
    of ALiBi. Sources: the released code of TransNormerLLM and of arXiv:2405.17381 for maps, norm
    and gate; slopes from general knowledge, without their change from layer to layer.
    """

    row_rule = BANDED

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        decay: str = "none",
        gate: bool = True,
        silu_values: bool = False,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend=backend, device=device, dtype=dtype)
        self.decay = decay
        self.silu_values = silu_values
        self.gate: nn.Sequential | None = None
        if gate:
            first = Linear(dim, self.head_dim, bias=False, device=device, dtype=dtype)
            second = Linear(self.head_dim, dim, bias=False, device=device, dtype=dtype)
            self.gate = nn.Sequential(first, second)

    def from_input(self, x: Tensor, grid: Grid) -> Tensor | None:
        """Logits of the gate, [B, N, C]."""
        return None if self.gate is None else self.gate(x)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        if self.silu_values:
            v = F.silu(v)
        if self.decay == "none":
            out = attend(q, k, v, "silu_sum", grid, backend=self.backend)
        else:
            out = self.decayed(F.silu(q), F.silu(k), v, grid) / grid.number(q)
        return self.gated(rms_norm(out.flatten(2)), extra).reshape(v.shape)

    def decayed(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        """Sums over keys whose weight falls with their distance on the map, [B, N, h, D]."""
        grid.needs_whole_map("transnormer with decay")
        prefix = grid.num_prefix_tokens
        products = grid.split(k.unsqueeze(-1) * v.unsqueeze(-2))[1]
        falls = slopes(self.num_heads, q.device, q.dtype)
        state = two_sided_sums(two_sided_sums(products, falls, 2), falls, 1)
        state = state.flatten(1, 2)
        out = (q[:, prefix:].unsqueeze(-2) @ state).squeeze(-2)
        if prefix:
            first = torch.einsum("bphd,bphe->bhde", k[:, :prefix], v[:, :prefix])
            out = out + torch.einsum("bnhd,bhde->bnhe", q[:, prefix:], first)
            whole = torch.einsum("bnhd,bnhe->bhde", k, v)
            out = torch.cat((torch.einsum("bphd,bhde->bphe", q[:, :prefix], whole), out), dim=1)
        return out

    def gated(self, x: Tensor, logits: Tensor | None) -> Tensor:
        """The output under its gate, [B, N, C]."""
        return x if logits is None else x * logits.to(x.dtype).sigmoid()

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """The quadratic form; see `Mixer.definition`."""
        weights = torch.einsum("bnhd,bmhd->bhnm", F.silu(q), F.silu(k)) / q.shape[1]
        if self.decay != "none":
            falls = slopes(self.num_heads, q.device, q.dtype)
            weights = weights * (-falls[:, None, None] * distances(grid, q.device)).exp()
        out = torch.einsum("bhnm,bmhd->bnhd", weights, F.silu(v) if self.silu_values else v)
        out = rms_norm_definition(out.flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return out.reshape(v.shape)
