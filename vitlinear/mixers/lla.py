"""Local linear attention: the value that a linear regression around the query predicts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlinear.layers.attention.scriptable_state import scriptable_read, scriptable_state
from vitlinear.layers.band import BANDED

from .description import AttentionDescription, Option
from .grid import Grid
from .mixer import Mixer
from .registry import register

TITLE = (
    "Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention for "
    "Test-Time Regression"
)
MOST_TOKENS = 1024


def ridged(covariance: Tensor, ridge: Tensor, energy: Tensor) -> Tensor:
    """C + ridge I, which a Cholesky factorisation can take.

    Args:
        covariance: [..., D, D].
        ridge: Above 0, broadcasts to [..., 1, 1].
        energy: Greatest sum of squares that went into the covariance, likewise: its rounding, which
            the sums cannot hold, is added to the ridge.
    """
    ridge = ridge + 8 * torch.finfo(covariance.dtype).eps * energy.detach()
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return covariance + ridge * identity


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """matrix^-1 right by a Cholesky factorisation, [..., D, D] and [..., D, E]."""
    if torch.onnx.is_in_onnx_export():
        return eliminated(matrix, right)
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))


def eliminated(matrix: Tensor, right: Tensor) -> Tensor:
    """matrix^-1 right by elimination, which a positive matrix needs no pivots for.

    In the steps that ONNX has: it knows no factorisations.
    """
    rows = torch.cat((matrix, right), dim=-1)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for i in range(matrix.shape[-1]):
        pivot = rows[..., i : i + 1, :] / rows[..., i : i + 1, i : i + 1]
        rows = rows - (rows[..., i : i + 1] - identity[:, i : i + 1]) * pivot
    return rows[..., matrix.shape[-1] :]


class _Regression(Mixer):
    """Mixers with a ridge of each head, kept as its logarithm."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        ridge: float = 1.0,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend=backend, device=device, dtype=dtype)
        self.initial_ridge = ridge
        self.log_ridge = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The ridge that was asked for."""
        nn.init.constant_(self.log_ridge, torch.tensor(self.initial_ridge).log().item())

    def ridge(self, dtype: torch.dtype) -> Tensor:
        """Of each head, [h]."""
        return self.log_ridge.to(dtype).exp()


@register(
    AttentionDescription(
        name="lla",
        formula="vbar_i + (q_i - kbar_i) (C_i + r I)^-1 C'_i, moments under softmax(s q_i k^T)",
        paper="arXiv:2510.01450",
        title=TITLE,
        year=2025,
        cost="2 N^2 D + N^2 D^2 + N D^3",
        state="2 N D",
        order="free",
        positive=False,
        rows_sum_to_one=True,
        query_magnitude=True,
        injective=True,
        options={"ridge": Option(1.0, "r at first, learned for each head", 1e-6, 1e6)},
        most_tokens=MOST_TOKENS,
        origin="Non-causal. Solved by Cholesky in the centred form, which the paper's equals; as "
        "in the released code, the ridge goes with the sum of the weights.",
    )
)
class Lla(_Regression):
    """Each query fits an affine map of keys to values, weighed by softmax, and evaluates it.

    The released formula, with w_ij = exp(s q_i . k_j), z_j = k_j - q_i, omega = sum w,
    mu = sum w z, S = sum w z z^T + r omega I and rho = S^-1 mu, is
    sum_j w_j (1 - rho . z_j) v_j / (omega - mu . rho). By the rule of Sherman and Morrison it
    equals the formula above, in which nothing vanishes. Softmax is the limit of a large r.
    """

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        logits = torch.einsum("bnhd,bmhd->bmhn", q, k) * self.head_dim**-0.5
        weights = grid.token_softmax(logits).permute(0, 2, 3, 1)  # [B, h, N, N]
        # About the mean key: what all keys share would round the rest of the moments away.
        centre = grid.mean(k).detach()
        q, k, v = (x.transpose(1, 2) for x in (q - centre, k - centre, v))
        mean = weights @ k
        products = (k.unsqueeze(-1) * k.unsqueeze(-2)).flatten(-2)
        moments = (weights @ products).unflatten(-1, (self.head_dim, self.head_dim))
        covariance = moments - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        energy = moments.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        matrix = ridged(covariance, self.ridge(q.dtype)[:, None, None, None], energy)
        slope = solve(matrix, (q - mean).unsqueeze(-1)).squeeze(-1)
        # (q - kbar) C^-1 C' = sum_j w_j (slope . (k_j - kbar)) v_j
        along = slope @ k.transpose(-1, -2) - (slope * mean).sum(-1, keepdim=True)
        return (weights * (1 + along) @ v).transpose(1, 2)

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """The paper's formula query by query; see `Mixer.definition`."""
        weights = (torch.einsum("bnhd,bmhd->bnhm", q, k) * self.head_dim**-0.5).exp()
        z = k.transpose(1, 2).unsqueeze(1) - q.unsqueeze(3)  # [B, N, h, N, D]
        omega = weights.sum(-1)
        mu = torch.einsum("bnhm,bnhmd->bnhd", weights, z)
        matrix = torch.einsum("bnhm,bnhmd,bnhme->bnhde", weights, z, z)
        ridge = (omega * self.log_ridge.exp())[..., None, None]
        matrix = matrix + ridge * torch.eye(self.head_dim, dtype=q.dtype)
        rho = torch.linalg.solve(matrix, mu)
        weights = weights * (1 - torch.einsum("bnhd,bnhmd->bnhm", rho, z))
        weights = weights / (omega - (mu * rho).sum(-1)).unsqueeze(-1)
        return torch.einsum("bnhm,bmhd->bnhd", weights, v)


@register(
    AttentionDescription(
        name="lla_uniform",
        formula="vbar + (q - kbar) (C + r I)^-1 C', C = cov(k, k), C' = cov(k, v)",
        paper="arXiv:2510.01450",
        title=TITLE,
        year=2025,
        cost="4 N D^2 + D^3",
        state="2 D (D + 1)",
        order="free",
        positive=False,
        rows_sum_to_one=True,
        query_magnitude=True,
        injective=False,
        backends=("eager", "library", "triton"),
        options={"ridge": Option(1.0, "r at first, learned for each head", 1e-6, 1e6)},
        origin="Not in the paper: its formula with weights that do not depend on the query, which "
        "makes one regression of all, at linear cost. `inline` is the same without the inverse, "
        "around 0 for kbar.",
    )
)
class LlaUniform(_Regression):
    """Affine ridge regression of values on keys, once for each head and image, read by queries."""

    row_rule = BANDED

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        mask, mean_k, mean_v = grid.key_padding_mask, grid.mean(k), grid.mean(v)
        q, k = q - mean_k, grid.hide(k - mean_k)
        both = torch.cat((k, grid.hide(v - mean_v)), dim=-1)
        state = scriptable_state(k, both, mask, self.backend, later=False)
        covariance, cross = state.split(self.head_dim, dim=-1)
        energy = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        matrix = ridged(covariance, self.ridge(q.dtype)[:, None, None], energy)
        return mean_v + scriptable_read(q, solve(matrix, cross), None, mask, self.backend)

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """Least squares for [1, k], whose first row has no ridge; see `Mixer.definition`."""
        one = torch.ones_like(k[..., :1])
        keys, queries = torch.cat((one, k), dim=-1), torch.cat((one, q), dim=-1)
        matrix = torch.einsum("bnhd,bnhe->bhde", keys, keys) / q.shape[1]
        ridge = self.log_ridge.exp()[:, None].expand(-1, self.head_dim)
        matrix = matrix + torch.diag_embed(torch.cat((ridge[:, :1] * 0, ridge), dim=-1))
        right = torch.einsum("bnhd,bnhe->bhde", keys, v) / q.shape[1]
        return torch.einsum("bnhd,bhde->bnhe", queries, torch.linalg.solve(matrix, right))
