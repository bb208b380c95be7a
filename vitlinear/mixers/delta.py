"""The delta rule without a direction: one regression of values on keys, solved or approached."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear.layers.attention.scriptable_state import scriptable_read, scriptable_state
from vitlinear.layers.band import BANDED
from vitlinear.layers.linear import Linear

from .delta_scans import directional, naive_scan
from .description import AttentionDescription, Change, Option
from .grid import Grid
from .lla import solve
from .mixer import Mixer
from .norms import rms_norm, rms_norm_definition, unit
from .registry import register

SOLVERS = ("solve", "richardson", "chebyshev")
DELTA_OPTIONS = {
    "form": Option(
        "order_free",
        "one regression, or scans of the delta rule in 2 or 4 directions",
        choices=("order_free", "scans_2", "scans_4"),
    ),
    "solver": Option("solve", "of the regression", choices=SOLVERS),
    "steps": Option(2, "of an iterative solver", 1, 4),
    "ridge": Option(0.02, "r at first, learned for each head", 1e-6, 1e3),
}
WITH_SCANS = (
    Change("form", ("scans_2", "scans_4"), {"order": "directional", "backends": ("eager",)}),
)


def approach(matrix: Tensor, right: Tensor, lowest: Tensor, solver: str, steps: int) -> Tensor:
    """matrix^-1 right, in a few steps or by a factorisation.

    Args:
        matrix: Symmetric, eigenvalues from `lowest` to 1 + `lowest`, [..., D, D].
        right: [..., D, E].
        lowest: Bound of the eigenvalues from below, broadcasts to [..., 1, 1].
        solver: ``solve``; ``richardson``: W + (right - matrix W) / (1 + lowest), from 0;
            ``chebyshev``: the steps whose residual is least for all eigenvalues between the bounds.
        steps: Products with the matrix, less one.

    Returns:
        [..., D, E]. One step of either is right itself, up to a factor: plain linear attention.
    """
    if solver == "solve":
        return solve(matrix, right)
    highest = 1 + lowest
    if solver == "richardson":
        out = right / highest
        for _ in range(steps - 1):
            out = out + (right - matrix @ out) / highest
        return out
    centre, radius = (highest + lowest) / 2, (highest - lowest) / 2
    change = right / centre
    out, rate = change, radius / centre  # rate: T_(n-1)(1/x) / T_n(1/x), x = radius / centre
    for _ in range(steps - 1):
        next_rate = 1 / (2 * centre / radius - rate)
        change = next_rate * (rate * change + 2 / radius * (right - matrix @ out))
        out, rate = out + change, next_rate
    return out


def half_of(extra: Tensor) -> torch.dtype | None:
    """The half type that the projections of a layer ran in, autocast or not; None for others."""
    return extra.dtype if extra.dtype in (torch.float16, torch.bfloat16) else None


class _DeltaRule(Mixer):
    """Keys of length 1 behind SiLU, a step of each token and head, and a ridge of each head."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        form: str = "order_free",
        solver: str = "solve",
        steps: int = 2,
        ridge: float = 0.02,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend=backend, device=device, dtype=dtype)
        self.scans = {"order_free": 0, "scans_2": 2, "scans_4": 4}[form]
        self.solver = solver
        self.steps = steps
        self.initial_ridge = ridge
        self.step = Linear(dim, num_heads, bias=False, device=device, dtype=dtype)
        shape = (num_heads, self.head_dim)
        self.norm_weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if self.scans:
            self.register_parameter("log_ridge", None)
        else:
            self.log_ridge = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Norms of 1 and the ridge that was asked for; projections have their own."""
        nn.init.ones_(self.norm_weight)
        if self.log_ridge is not None:
            nn.init.constant_(self.log_ridge, torch.tensor(self.initial_ridge).log().item())

    def regression(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, ridge: Tensor, grid: Grid
    ) -> Tensor:
        """q (mean b k k^T + ridge)^-1 mean b k v^T, [B, N, h, D].

        Args:
            q: Queries, [B, N, h, D].
            k: Keys of length 1 or 0.
            v: Values.
            beta: b, from 0 to 1, [B, N, h, 1].
            ridge: Of each channel of the keys, [B or 1, h, D].
            grid: Where the tokens stand.
        """
        mask = grid.key_padding_mask
        both = torch.cat((k, v), dim=-1)
        state = scriptable_state(k, both, mask, self.backend, later=False, key_weights=beta)
        matrix, right = state.split(self.head_dim, dim=-1)
        # The trace of the mean is at most 1, and with it every eigenvalue.
        lowest = ridge.amin(-1)[..., None, None]
        if self.solver != "solve":
            # Channels of a larger ridge are scaled down to the least one, symmetrically.
            scale = (lowest.squeeze(-1) / ridge).sqrt().unsqueeze(-1)
            matrix, right = matrix * scale * scale.transpose(-1, -2), right * scale
            identity = torch.eye(self.head_dim, dtype=q.dtype, device=q.device)
            out = approach(matrix + lowest * identity, right, lowest, self.solver, self.steps)
            return scriptable_read(q, out * scale, None, mask, self.backend)
        matrix = matrix + torch.diag_embed(ridge)
        return scriptable_read(q, solve(matrix, right), None, mask, self.backend)

    def regression_definition(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, ridge: Tensor
    ) -> Tensor:
        """The same with eigenvectors, and the polynomials of the solvers; arguments likewise."""
        scale = (ridge.amin(-1, keepdim=True) / ridge).sqrt().unsqueeze(-1)  # [B, h, D, 1]
        lowest = ridge.amin(-1)[..., None, None]
        matrix = torch.einsum("bnhd,bnhe->bhde", beta * k, k) / q.shape[1]
        right = torch.einsum("bnhd,bnhe->bhde", beta * k, v) / q.shape[1] * scale
        matrix = matrix * scale * scale.transpose(-1, -2)
        identity = torch.eye(self.head_dim, dtype=q.dtype)
        matrix = matrix + lowest * identity
        if self.solver == "solve":
            out = torch.linalg.inv(matrix) @ right
        else:
            # Residual polynomials: (1 - x / highest)^n, or T_n of the interval, both 1 at 0.
            highest = 1 + lowest
            if self.solver == "richardson":
                residual = torch.linalg.matrix_power(identity - matrix / highest, self.steps)
            else:
                slope = 2 / (highest - lowest)
                shift = (highest + lowest) / (highest - lowest)
                before, now = identity.expand_as(matrix), shift * identity - slope * matrix
                first, second = torch.ones_like(shift), shift
                for _ in range(self.steps - 1):
                    before, now = now, 2 * (shift * identity - slope * matrix) @ now - before
                    first, second = second, 2 * shift * second - first
                residual = now / second
            out = torch.linalg.inv(matrix) @ (identity - residual) @ right
        return torch.einsum("bnhd,bhde->bnhe", q, scale * out)


@register(
    AttentionDescription(
        name="delta",
        formula="RMSNorm(q (K^T B K / N + r I)^-1 K^T B V / N), or scans of the delta rule",
        paper="arXiv:2406.06484",
        title="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
        year=2024,
        cost="3 N D^2 + D^3; a scan N D (2 D + 2 C), C = 64",
        state="2 D^2",
        order="free",
        positive=False,
        rows_sum_to_one=False,
        query_magnitude=True,
        injective=False,
        backends=("eager", "library", "triton"),
        options=DELTA_OPTIONS,
        changes=WITH_SCANS,
        needs_input=True,
        origin="The order-free form is derived: the limit of steps of the rule on all tokens at "
        "once, a ridge regression weighed by b. Scans run along rows and back, or columns too, "
        "and their outputs are averaged, which counts a token's own value in each. With scans the "
        "order of the tokens matters.",
    )
)
class Delta(_DeltaRule):
    """A state that predicts values from keys, corrected by what it predicted before.

    DeltaNet takes q = s u(SiLU(q)), k = u(SiLU(k)) with u(x) = x / |x|, and b = sigmoid(w x). Along
    a scan, S <- S + b k (v - S^T k)^T and out = S^T q. Its short convolutions stay outside. The
    output goes through an RMS norm of each head. Source: arXiv:2406.06484.
    """

    row_rule = BANDED

    def from_input(self, x: Tensor, grid: Grid) -> Tensor | None:
        """Logits of the steps, [B, N, h]."""
        return self.step(x)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        assert extra is not None
        q, k = unit(F.silu(q)) * self.head_dim**-0.5, unit(F.silu(k))
        beta = grid.hide(extra.to(q.dtype).sigmoid().unsqueeze(-1))
        if self.scans:
            out = directional(q, k, v, beta, None, grid, self.scans, half_of(extra))
        else:
            ridge = self.log_ridge.to(q.dtype).exp()[None, :, None].expand(1, -1, self.head_dim)
            out = self.regression(q, k, v, beta, ridge, grid)
        return rms_norm(out, self.norm_weight)

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """Normal equations, or the rule token by token; see `Mixer.definition`."""
        assert x is not None
        q, k = (F.normalize(F.silu(t), dim=-1) for t in (q, k))
        q = q * self.head_dim**-0.5
        beta = (x @ self.step.weight.T).sigmoid().unsqueeze(-1)
        if self.scans:
            out = naive_scan(q, k, v, beta, None, grid, self.scans)
        else:
            ridge = self.log_ridge.exp()[None, :, None].expand(q.shape[0], -1, self.head_dim)
            out = self.regression_definition(q, k, v, beta, ridge)
        return rms_norm_definition(out, self.norm_weight)


@register(
    AttentionDescription(
        name="kimi_delta",
        formula="RMSNorm(q (K^T B K / N + diag(r + a))^-1 K^T B V / N) sigmoid(g), or scans",
        paper="arXiv:2510.26692",
        title="Kimi Linear: An Expressive, Efficient Attention Architecture",
        year=2025,
        cost="3 N D^2 + D^3; a scan N D (2 D + 3 C), C = 16",
        state="2 D^2",
        order="free",
        positive=False,
        rows_sum_to_one=False,
        query_magnitude=True,
        injective=False,
        backends=("eager", "library", "triton"),
        options=DELTA_OPTIONS,
        changes=WITH_SCANS,
        needs_input=True,
        origin="The order-free form is derived: without a direction forgetting is a ridge of each "
        "channel of the keys, a, the mean share that a token makes it forget. Scans are those of "
        "`delta`. With scans the order of the tokens matters.",
    )
)
class KimiDelta(_DeltaRule):
    """The delta rule whose state forgets, each channel of the keys at its own rate.

    Along a scan, S <- diag(exp(-f)) S before each step of the rule, with
    f = exp(A) softplus(W2 W1 x + c) for each channel, A of each head; f is at most 5, the bound of
    the variant of flash-linear-attention that cannot underflow. q, k and b are as `Delta`. The
    output goes through an RMS norm of each head and the gate sigmoid(W4 W3 x), both with D channels
    between. Source: arXiv:2510.26692.
    """

    row_rule = BANDED
    resets_parts = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **kwargs)  # type: ignore[arg-type]
        self.forget, self.gate = (
            nn.Sequential(
                Linear(dim, self.head_dim, bias=False, device=device, dtype=dtype),
                Linear(self.head_dim, dim, bias=True, device=device, dtype=dtype),
            )
            for _ in range(2)
        )
        self.rate = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `Delta`, and hardly any forgetting."""
        super().reset_parameters()
        if hasattr(self, "rate"):  # not yet while `Delta` is made
            nn.init.zeros_(self.rate)
            bias = self.forget[1].bias
            assert isinstance(bias, Tensor)
            nn.init.constant_(bias, -4.0)  # softplus(-4) = 0.02 for each token

    def from_input(self, x: Tensor, grid: Grid) -> Tensor | None:
        """Logits of the steps, of forgetting and of the gate, [B, N, h + 2 C]."""
        return torch.cat((self.step(x), self.forget(x), self.gate(x)), dim=-1)

    def falls(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """f, [B, N, h, D], from 0 to 5."""
        fall = F.softplus(logits.to(dtype).unflatten(-1, (self.num_heads, self.head_dim)))
        return (self.rate.to(dtype).exp()[:, None] * fall).clamp(max=5.0)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        assert extra is not None
        step, forget, gate = extra.split([self.num_heads, self.dim, self.dim], dim=-1)
        q, k = unit(F.silu(q)) * self.head_dim**-0.5, unit(F.silu(k))
        beta = grid.hide(step.to(q.dtype).sigmoid().unsqueeze(-1))
        falls = grid.hide(self.falls(forget, q.dtype))
        if self.scans:
            out = directional(q, k, v, beta, falls, grid, self.scans, half_of(extra))
        else:
            ridge = self.log_ridge.to(q.dtype).exp()[:, None]
            ridge = ridge + grid.mean(grid.hide(-torch.expm1(-falls))).squeeze(1)
            out = self.regression(q, k, v, beta, ridge, grid)
        return rms_norm(out, self.norm_weight) * gate.to(q.dtype).sigmoid().reshape(v.shape)

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """Normal equations, or the rule token by token; see `Mixer.definition`."""
        assert x is not None
        q, k = (F.normalize(F.silu(t), dim=-1) for t in (q, k))
        q = q * self.head_dim**-0.5
        beta, gate = self.step(x).sigmoid().unsqueeze(-1), self.gate(x).sigmoid().reshape(v.shape)
        falls = F.softplus(self.forget(x)).reshape(v.shape) * self.rate.exp()[:, None]
        falls = falls.clamp(max=5)
        if self.scans:
            out = naive_scan(q, k, v, beta, falls, grid, self.scans)
        else:
            ridge = self.log_ridge.exp()[:, None] + (1 - (-falls).exp()).mean(1)
            out = self.regression_definition(q, k, v, beta, ridge)
        return rms_norm_definition(out, self.norm_weight) * gate
