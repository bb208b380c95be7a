"""State-space duality without a direction: VSSD, and EfficientViM's mixer of hidden states."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear.layers.attention.scriptable_state import scriptable_read, scriptable_state
from vitlinear.layers.band import BANDED
from vitlinear.layers.init_normal import init_normal_
from vitlinear.layers.linear import Linear

from .description import AttentionDescription
from .grid import Grid
from .mixer import Mixer
from .operator import attend
from .registry import register

BACKENDS = ("eager", "library", "triton")


@register(
    AttentionDescription(
        name="vssd",
        formula="q S + d v, S = mean c_j k_j v_j^T, c = exp(a) softplus(w x + b)",
        paper="arXiv:2407.18559",
        title="VSSD: Vision Mamba with Non-Causal State Space Duality",
        year=2024,
        cost="2 N D^2",
        state="D^2",
        order="free",
        positive=False,
        rows_sum_to_one=False,
        query_magnitude=True,
        injective=False,
        backends=BACKENDS,
        needs_input=True,
        origin="Between the projections: the paper's convolution and gate around it stay out. "
        "General knowledge for the parameters of c; sums are means.",
    )
)
class Vssd(Mixer):
    """One hidden state of all tokens, to which each token adds as much as its step says.

    Mamba-2's C, B and x are q, k and v. Without a direction decay has no meaning, and what is left
    of it is a weight c_j of each token and head: the step softplus(w x_j + b) times a rate exp(a).
    d is a factor of the token's own value, 1 at first.
    """

    row_rule = BANDED

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
        self.step = Linear(dim, num_heads, device=device, dtype=dtype)
        self.rate = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.skip = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Rates and factors of 1."""
        nn.init.zeros_(self.rate)
        nn.init.ones_(self.skip)

    def from_input(self, x: Tensor, grid: Grid) -> Tensor | None:
        """Steps before softplus, [B, N, h]."""
        return self.step(x)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        assert extra is not None
        steps = extra.to(q.dtype)
        # softplus, of which PyTorch's compilers take the gradient for one in another order.
        steps = torch.logaddexp(steps, torch.zeros_like(steps))
        weights = steps * self.rate.to(q.dtype).exp()
        out = attend(
            q, k, v, "weighted_identity", grid,
            key_weights=weights.unsqueeze(-1), backend=self.backend,
        )  # fmt: skip
        return out + v * self.skip.to(v.dtype)[:, None]

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """The quadratic form; see `Mixer.definition`."""
        assert x is not None
        steps = F.softplus(x @ self.step.weight.T + self.step.bias) * self.rate.exp()
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[1]
        weights = weights * steps.transpose(1, 2).unsqueeze(2)
        weights = weights + torch.diag_embed(self.skip[:, None].expand(-1, q.shape[1]))
        return torch.einsum("bhnm,bmhd->bnhd", weights, v)


@register(
    AttentionDescription(
        name="efficientvim",
        formula="q g(S), S = sum softmax_j(W x_j + b) k_j v_j^T, g(S) = (a SiLU(z) + d a) W2",
        paper="arXiv:2411.15241",
        title="EfficientViM: Efficient Vision Mamba with Hidden State Mixer based State Space "
        "Duality",
        year=2024,
        cost="2 N D^2",
        state="D (D + 1)",
        order="free",
        positive=False,
        rows_sum_to_one=False,
        query_magnitude=True,
        injective=False,
        backends=BACKENDS,
        needs_input=True,
        origin="Between the projections; general knowledge for the form of g, (a, z) = S W1, which "
        "stands in each head here.",
    )
)
class EfficientVim(Mixer):
    """A hidden state of D rows by a softmax over the tokens, and a gated unit on its rows.

    What usually acts on all tokens acts on the D rows of the state: its cost does not grow with the
    image. Keys are weighed in each channel by a softmax over the tokens of a projection of the
    input. d is 1 for each head at first.
    """

    row_rule = BANDED

    state_in: Tensor
    state_out: Tensor

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
        self.step = Linear(dim, dim, device=device, dtype=dtype)
        width = self.head_dim
        for name, columns in (("state_in", 2 * width), ("state_out", width)):
            weight = torch.empty(num_heads, width, columns, device=device, dtype=dtype)
            setattr(self, name, nn.Parameter(weight))
        self.skip = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Products that keep the size of what goes in, and factors of 1."""
        for weight in (self.state_in, self.state_out):
            init_normal_(weight, std=self.head_dim**-0.5)
        nn.init.ones_(self.skip)

    def from_input(self, x: Tensor, grid: Grid) -> Tensor | None:
        """Logits of the softmax over tokens, [B, N, C]."""
        return self.step(x)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        assert extra is not None
        weights = grid.token_softmax(extra.to(q.dtype).reshape(k.shape)) * grid.number(q)
        mask = grid.key_padding_mask
        state = scriptable_state(k, v, mask, self.backend, key_weights=weights)
        a, z = (state @ self.state_in.to(state.dtype)).chunk(2, dim=-1)
        a = a * F.silu(z) + a * self.skip.to(a.dtype)[:, None, None]
        return scriptable_read(q, a @ self.state_out.to(a.dtype), None, mask, self.backend)

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """The state row by row; see `Mixer.definition`."""
        assert x is not None
        logits = (x @ self.step.weight.T + self.step.bias).reshape(k.shape)
        rows = []
        for c in range(self.head_dim):
            weights = logits[..., c].softmax(1) * k[..., c]
            row = torch.einsum("bnh,bnhe->bhe", weights, v)
            a, z = torch.einsum("bhe,hef->bhf", row, self.state_in).chunk(2, dim=-1)
            a = a * F.silu(z) + a * self.skip[:, None]
            rows.append(torch.einsum("bhe,hef->bhf", a, self.state_out))
        return torch.einsum("bnhd,bhde->bnhe", q, torch.stack(rows, dim=2))
