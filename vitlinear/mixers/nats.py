"""NAtS-L: each head decides which windows stay exact, and which become part of a state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear.layers.linear import Linear

from .description import AttentionDescription, Option
from .grid import Grid
from .grid_windows import GridWindows, hidden_scores
from .mixer import Mixer
from .norms import rms_norm, rms_norm_definition
from .operator import attend
from .registry import register


@register(
    AttentionDescription(
        name="nats",
        formula="w1 RMSNorm(softmax over chosen windows) + w2 RMSNorm(f(q) S of the rest)",
        paper="github.com/automl/NeuralAttentionSearchLinear",
        title="Neural Attention Search Linear: Towards Adaptive Token-Level Hybrid Attention "
        "Models",
        year=2026,
        cost="2 N D^2 + 2 N K w^2 D, K chosen windows of side w",
        state="D^2 + 2 K w^2 D",
        order="local",
        positive=True,
        rows_sum_to_one=False,
        query_magnitude=True,
        injective=False,
        backends=("eager", "library", "triton"),
        options={
            "window": Option(7, "side of a window", 1, 64),
            "most_windows": Option(4, "windows that may stay exact, of each head", 1, 64),
        },
        needs_input=True,
        origin="Windows of 7 x 7 for chunks, of which at most K stay exact, so that the cost is "
        "linear; elu + 1 without a division in the place of the gated delta rule, which has a "
        "direction. Tokens before the map are seen exactly.",
    )
)
class Nats(Mixer):
    """Softmax over the windows that a head has chosen beside linear attention to all others.

    A window's score is W times the mean of its inputs, two numbers for each head: it stays exact
    where the first is the greater, among the K with the greatest difference; the best one always
    stays. The choice is hard, and its gradient is that of the sigmoid of the difference
    (straight-through). Both outputs go through an RMS norm of each head, and the query weighs them:
    (w1, w2) = softmax(W' q). Source: the released code.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 7,
        most_windows: int = 4,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend=backend, device=device, dtype=dtype)
        self.window = window
        self.most_windows = most_windows
        self.score = Linear(dim, 2 * num_heads, bias=False, device=device, dtype=dtype)
        self.share, self.softmax_norm, self.linear_norm = (
            nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            for shape in ((num_heads, self.head_dim, 2), *[(num_heads, self.head_dim)] * 2)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Equal shares, and norms of weight 1."""
        nn.init.zeros_(self.share)
        for weight in (self.softmax_norm, self.linear_norm):
            nn.init.ones_(weight)

    def from_input(self, x: Tensor, grid: Grid) -> Tensor | None:
        """Scores of the tokens, [B, N, 2 h], whose means over windows are those of the windows."""
        return self.score(x)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        assert extra is not None
        windows, prefix = GridWindows(grid, self.window), grid.num_prefix_tokens
        present = windows.present(q)
        scores = grid.hide(extra.to(q.dtype).unflatten(-1, (2, self.num_heads)))
        means = windows.cut(scores).sum(2) / present.sum(2).clamp(min=1)[..., None, None]
        gain = (means[:, :, 0] - means[:, :, 1]).transpose(1, 2)  # [B, h, M]
        exists = present.any(2).unsqueeze(1)
        best = (
            gain.detach()
            .masked_fill(~exists, -torch.inf)
            .topk(min(self.most_windows, windows.count), dim=-1)
        )
        # The best one stays, even where linear attention would be preferred.
        keep = best.values > 0
        keep = torch.cat((torch.ones_like(keep[..., :1]), keep[..., 1:]), dim=-1)
        hard = torch.zeros_like(gain).scatter(-1, best.indices, keep.to(gain.dtype))
        soft = gain.sigmoid()
        exact = hard + (soft - soft.detach())

        # Tokens of the chosen windows, and those before the map, as keys: [B, h, keys, D].
        def taken(x: Tensor) -> Tensor:
            x = windows.cut(x).permute(0, 3, 1, 2, 4)  # [B, h, M, T, D]
            index = best.indices[..., None, None].expand(-1, -1, -1, *x.shape[3:])
            return x.gather(2, index).flatten(2, 3)

        first_k, first_v = (x[:, :prefix].transpose(1, 2) for x in (k, v))
        keys = torch.cat((first_k, taken(k)), dim=2)
        values = torch.cat((first_v, taken(v)), dim=2)
        weights = exact.gather(-1, best.indices).unsqueeze(-1).expand(-1, -1, -1, windows.length)
        seen = present.unsqueeze(1).expand(-1, self.num_heads, -1, -1)
        seen = seen.gather(2, best.indices.unsqueeze(-1).expand(-1, -1, -1, windows.length))
        seen = (seen & keep.unsqueeze(-1)).flatten(2)
        ahead = seen.new_ones(*seen.shape[:2], prefix)
        if grid.key_padding_mask is not None:
            ahead = ahead & ~grid.key_padding_mask[:, None, :prefix]
        seen = torch.cat((ahead, seen), dim=2).unsqueeze(2)
        weights = torch.cat((ahead.to(q.dtype), weights.flatten(2)), dim=2).unsqueeze(2)
        logits = hidden_scores(q.transpose(1, 2) @ keys.transpose(-1, -2), seen)
        logits = logits * self.head_dim**-0.5
        attention = (logits - logits.amax(-1, keepdim=True)).exp() * weights
        attention = attention / attention.sum(-1, keepdim=True).clamp(min=1e-30)
        softmax = (attention @ values).transpose(1, 2)

        # All others: weights of the tokens of the map, by the window that they lie in.
        of_tokens = (1 - exact)[..., windows.numbers(q.device)].transpose(1, 2)
        of_tokens = torch.cat((of_tokens[:, :1].expand(-1, prefix, -1) * 0, of_tokens), dim=1)
        linear = attend(
            q, k, v, "weighted_elu_sum", grid,
            key_weights=of_tokens.unsqueeze(-1), backend=self.backend,
        )  # fmt: skip
        # Where no window is left this is 0, of which a norm has a derivative of 1 / sqrt(eps). What
        # is not there passes no gradient on.
        left = (exists & (hard == 0)).any(-1)
        linear = linear.masked_fill(~left[:, None, :, None], 0)
        share = torch.einsum("bnhd,hdc->bnhc", q, self.share.to(q.dtype)).softmax(-1)
        softmax = rms_norm(softmax, self.softmax_norm) * share[..., :1]
        return softmax + rms_norm(linear, self.linear_norm) * share[..., 1:]

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """Both quadratic forms under the choice; see `Mixer.definition`."""
        assert x is not None
        prefix, heads = grid.num_prefix_tokens, self.num_heads
        exact = q.new_ones(q.shape[0], heads, grid.length)
        scores = (x @ self.score.weight.T)[:, prefix:]
        scores = scores.reshape(q.shape[0], grid.height, grid.width, 2, heads)
        gains, places = [], []
        for row in range(0, grid.height, self.window):
            for col in range(0, grid.width, self.window):
                area = (slice(row, row + self.window), slice(col, col + self.window))
                mean = scores[(slice(None), *area)].mean((1, 2))
                gains.append(mean[:, 0] - mean[:, 1])
                number = torch.arange(grid.height * grid.width).reshape(grid.height, -1)
                places.append(number[area].flatten() + prefix)
        gain = torch.stack(gains)
        for image in range(q.shape[0]):
            for head in range(heads):
                ranked = gain[:, image, head].argsort(descending=True).tolist()
                for rank, window in enumerate(ranked):
                    value = gain[window, image, head]
                    chosen = rank == 0 or (rank < self.most_windows and value.item() > 0)
                    soft = value.sigmoid()
                    choice = float(chosen) + soft - soft.detach()
                    index = (torch.tensor(image), torch.tensor(head), places[window])
                    exact = exact.index_put(index, choice)
        pairs = torch.einsum("bnhd,bmhd->bhnm", q, k) * self.head_dim**-0.5
        # Of windows that were not chosen the softmax knows nothing, not even the gradient.
        weights = exact * (exact.detach() > 0.5)
        weights = pairs.exp() * weights.unsqueeze(2)
        weights = weights / weights.sum(-1, keepdim=True)
        softmax = torch.einsum("bhnm,bmhd->bnhd", weights, v)
        weights = torch.einsum("bnhd,bmhd->bhnm", F.elu(q) + 1, F.elu(k) + 1)
        of_map = torch.arange(grid.length) >= prefix
        weights = weights * ((1 - exact) * of_map).unsqueeze(2) / grid.length
        linear = torch.einsum("bhnm,bmhd->bnhd", weights, v)
        left = ((exact.detach() < 0.5) & of_map).any(-1)  # none, none of the gradient either
        linear = linear.masked_fill(~left[:, None, :, None], 0)
        share = torch.einsum("bnhd,hdc->bnhc", q, self.share).softmax(-1)
        softmax = rms_norm_definition(softmax, self.softmax_norm) * share[..., :1]
        return softmax + rms_norm_definition(linear, self.linear_norm) * share[..., 1:]
