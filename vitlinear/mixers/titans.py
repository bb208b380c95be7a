"""Titans and Miras without a direction: a memory that is trained on all tokens at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear.layers.attention.scriptable_state import scriptable_read, scriptable_state
from vitlinear.layers.band import BANDED
from vitlinear.layers.linear import Linear

from .description import AttentionDescription, Option
from .grid import Grid
from .mixer import Mixer
from .norms import length, unit
from .registry import register

BACKENDS = ("eager", "library", "triton")
STEPS = {"steps": Option(2, "of descent on all tokens", 1, 8)}


class _Memory(Mixer):
    """A linear memory of each head, M, with a learned first state, and numbers learned per head.

    Queries and keys are u(SiLU(.)) with u(x) = x / |x|, so that no step of descent overshoots: the
    mean of theta k k^T with theta at most 1 has eigenvalues of at most 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        steps: int,
        rates: int,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend=backend, device=device, dtype=dtype)
        self.steps = steps
        shape = (num_heads, self.head_dim, self.head_dim)
        self.memory = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.decay = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.rate = Linear(dim, rates * num_heads, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """An empty memory that hardly forgets."""
        nn.init.zeros_(self.memory)
        nn.init.constant_(self.decay, -4.0)

    def from_input(self, x: Tensor, grid: Grid) -> Tensor | None:
        """Logits of the rates of the tokens, [B, N, rates h]."""
        return self.rate(x)

    def first(self, like: Tensor) -> Tensor:
        """M before the first step, [B, h, D, D]."""
        return self.memory.to(like.dtype).expand(like.shape[0], -1, -1, -1)


@register(
    AttentionDescription(
        name="titans",
        formula="q M_T, M <- (1 - a) M + S, S <- e S - grad of mean theta |k M - v|^2 / 2",
        paper="arXiv:2501.00663",
        title="Titans: Learning to Memorize at Test Time",
        year=2025,
        cost="3 N D^2 + T D^3, T steps",
        state="2 D^2",
        order="free",
        positive=False,
        rows_sum_to_one=False,
        query_magnitude=True,
        injective=False,
        backends=BACKENDS,
        options=STEPS,
        needs_input=True,
        origin="Derived: the steps of descent see all tokens at once instead of one after another. "
        "The memory is linear where the paper's has two layers or more; momentum and forgetting "
        "are of each head.",
    )
)
class Titans(_Memory):
    """A memory by T steps of descent with momentum and forgetting, on all keys and values.

    theta_j = sigmoid(w x_j) is the step of a token; e, the momentum, and a, the forgetting, are the
    sigmoids of parameters. One step from an empty memory is linear attention with keys of length 1.
    All T steps need one pass over the tokens, as the loss is quadratic. Source: arXiv:2501.00663,
    equations 9 to 14, for a linear memory.
    """

    row_rule = BANDED

    def __init__(self, dim: int, num_heads: int, *, steps: int = 2, **kwargs: object) -> None:
        super().__init__(dim, num_heads, steps=steps, rates=1, **kwargs)  # type: ignore[arg-type]
        self.momentum = nn.Parameter(torch.empty_like(self.decay))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As every memory, and half of the momentum."""
        super().reset_parameters()
        if hasattr(self, "momentum"):  # not yet while `_Memory` is made
            nn.init.zeros_(self.momentum)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        assert extra is not None
        mask = grid.key_padding_mask
        q, k = unit(F.silu(q)), unit(F.silu(k))
        theta = extra.to(q.dtype).sigmoid().unsqueeze(-1)
        both = torch.cat((k, v), dim=-1)
        state = scriptable_state(k, both, mask, self.backend, key_weights=theta)
        matrix, right = state.split(self.head_dim, dim=-1)
        keeps = 1 - self.decay.to(q.dtype).sigmoid()[:, None, None]
        momentum = self.momentum.to(q.dtype).sigmoid()[:, None, None]
        memory = self.first(q)
        surprise = torch.zeros_like(memory)
        for _ in range(self.steps):
            surprise = momentum * surprise - (matrix @ memory - right)
            memory = keeps * memory + surprise
        return scriptable_read(q, memory, None, mask, self.backend)

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """Descent by autograd; see `Mixer.definition`."""
        assert x is not None
        q, k = (F.normalize(F.silu(t), dim=-1) for t in (q, k))
        theta = (x @ self.rate.weight.T + self.rate.bias).sigmoid()
        memory = self.memory.expand(q.shape[0], -1, -1, -1)
        surprise = torch.zeros_like(memory)
        for _ in range(self.steps):
            with torch.enable_grad():
                if not memory.requires_grad:
                    memory = memory.detach().requires_grad_()
                errors = torch.einsum("bnhd,bhde->bnhe", k, memory) - v
                loss = (theta * errors.square().sum(-1) / 2).mean(1).sum()
                (gradient,) = torch.autograd.grad(loss, memory, create_graph=True)
            surprise = self.momentum.sigmoid()[:, None, None] * surprise - gradient
            memory = (1 - self.decay.sigmoid())[:, None, None] * memory + surprise
        return torch.einsum("bnhd,bhde->bnhe", q, memory)


@register(
    AttentionDescription(
        name="miras",
        formula="q M_T, M <- (1 - a) M - grad of mean theta huber(|k M - v|, delta)",
        paper="arXiv:2504.13173",
        title="It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, "
        "Retention, and Online Optimization",
        year=2025,
        cost="4 T N D^2, T steps",
        state="D^2",
        order="free",
        positive=False,
        rows_sum_to_one=False,
        query_magnitude=True,
        injective=False,
        backends=BACKENDS,
        options=STEPS,
        needs_input=True,
        origin="Derived: Yaad, the model with Huber's loss, whose steps see all tokens at once, "
        "with a linear memory. Moneta (p-norms) and Memora (entropy) are left out.",
    )
)
class Miras(_Memory):
    """A memory that tokens with large errors do not bend: descent on Huber's loss.

    Of token j with the error r_j, the gradient of the loss is that of a square loss times
    min(1, delta_j / |r_j|), with delta_j = softplus(w' x_j) and the step theta_j = sigmoid(w x_j).
    So every step is a pass of linear attention whose keys are weighed by the errors of the last
    one. With a large delta and no momentum, `titans` is the same. Source: arXiv:2504.13173, the
    variant Yaad.
    """

    row_rule = BANDED

    def __init__(self, dim: int, num_heads: int, *, steps: int = 2, **kwargs: object) -> None:
        super().__init__(dim, num_heads, steps=steps, rates=2, **kwargs)  # type: ignore[arg-type]

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        assert extra is not None
        mask = grid.key_padding_mask
        q, k = unit(F.silu(q)), unit(F.silu(k))
        theta, delta = extra.to(q.dtype).unsqueeze(-1).chunk(2, dim=2)
        theta, delta = grid.hide(theta.sigmoid()), grid.hide(F.softplus(delta))
        keeps = 1 - self.decay.to(q.dtype).sigmoid()[:, None, None]
        memory = self.first(q)
        for _ in range(self.steps):
            errors = v - scriptable_read(k, memory, None, mask, self.backend)
            size = length(errors)
            weights = theta * torch.where(size > delta, delta / size.clamp(min=1e-30), 1.0)
            step = scriptable_state(k, errors, mask, self.backend, later=False, key_weights=weights)
            memory = keeps * memory + step
        return scriptable_read(q, memory, None, mask, self.backend)

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """Descent on Huber's loss by autograd; see `Mixer.definition`."""
        assert x is not None
        q, k = (F.normalize(F.silu(t), dim=-1) for t in (q, k))
        theta, delta = (x @ self.rate.weight.T + self.rate.bias).chunk(2, dim=-1)
        theta, delta = theta.sigmoid(), F.softplus(delta)
        memory = self.memory.expand(q.shape[0], -1, -1, -1)
        for _ in range(self.steps):
            with torch.enable_grad():
                if not memory.requires_grad:
                    memory = memory.detach().requires_grad_()
                size = (torch.einsum("bnhd,bhde->bnhe", k, memory) - v).norm(dim=-1)
                loss = torch.where(size <= delta, size**2 / 2, delta * (size - delta / 2))
                loss = (theta * loss).mean(1).sum()
                (gradient,) = torch.autograd.grad(loss, memory, create_graph=True)
            memory = (1 - self.decay.sigmoid())[:, None, None] * memory - gradient
        return torch.einsum("bnhd,bhde->bnhe", q, memory)
