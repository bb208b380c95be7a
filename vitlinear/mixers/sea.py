"""SEA: attention whose matrix is estimated at a linear cost, and then kept sparse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .description import AttentionDescription, Option
from .grid import Grid
from .grid_windows import hidden_scores
from .mixer import Mixer
from .norms import heads_matrix
from .operator import attend
from .registry import register


@register(
    AttentionDescription(
        name="sea",
        formula="g softmax(s q k^T + mask) v + (1 - g) vbar, mask: the best of an estimate",
        paper="arXiv:2310.01777",
        title="SEA: Sparse Linear Attention with Estimated Attention Mask",
        year=2023,
        cost="2 N^2 D",
        state="2 N D",
        order="local",
        positive=True,
        rows_sum_to_one=True,
        query_magnitude=True,
        injective=False,
        options={
            "segments": Option(16, "columns of the estimate, runs of tokens", 2, 256),
            "kept": Option(4, "segments that a query keeps", 1, 256),
        },
        most_tokens=1024,
        origin="Study size: the sparse mask is a full matrix here, so the cost is that of softmax. "
        "The estimate comes from linear attention with elu + 1 in the place of Performer, and a "
        "two-layer network without the paper's convolutions. General knowledge of the paper.",
    )
)
class Sea(Mixer):
    """Softmax over the segments that an estimate of the attention keeps, mixed with the mean value.

    The tokens of the map, row by row, are cut into K segments. Linear attention to the values and
    to the segment that each key lies in tells each query roughly where it looks; a network of each
    head makes K logits of that. The segments with the greatest logits are kept, and their softmax
    weighs them beside the scores, so that the estimate learns. g = sigmoid(w q + b). Tokens before
    the map are always kept.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        segments: int = 16,
        kept: int = 4,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend=backend, device=device, dtype=dtype)
        if kept > segments:
            raise ValueError(f"sea: kept must be at most segments, {segments}, got {kept}")
        self.segments = segments
        self.kept = kept
        width = self.head_dim
        for name, rows, cols in (
            ("estimate_in", 2 * width + segments, width),
            ("estimate_out", width, segments),
            ("mix_weight", width, 1),
        ):
            weight = torch.empty(num_heads, rows, cols, device=device, dtype=dtype)
            setattr(self, name, nn.Parameter(weight))
        self.mix_bias = nn.Parameter(torch.empty(num_heads, 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Products that keep the size of what goes in, and mostly the sparse attention."""
        for weight in (self.estimate_in, self.estimate_out, self.mix_weight):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        nn.init.constant_(self.mix_bias, 2.0)

    estimate_in: Tensor
    estimate_out: Tensor
    mix_weight: Tensor

    def segment(self, grid: Grid, like: Tensor) -> Tensor:
        """The segment of each token of the map, 1 for its own and 0 else, [B or 1, H W, K].

        Tokens are counted without padding.
        """
        if grid.key_padding_mask is None:
            valid = torch.ones(1, grid.height * grid.width, dtype=torch.long, device=like.device)
        else:
            valid = (~grid.key_padding_mask[:, grid.num_prefix_tokens :]).long()
        count = valid.sum(1, keepdim=True).clamp(min=1)
        number = (valid.cumsum(1) - 1).clamp(min=0) * self.segments // count
        ids = torch.arange(self.segments, device=like.device)
        return (number.unsqueeze(-1) == ids).to(like.dtype) * valid.unsqueeze(-1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        prefix = grid.num_prefix_tokens
        of_segment = self.segment(grid, q).expand(q.shape[0], -1, -1)
        of_token = F.pad(of_segment, (0, 0, prefix, 0))
        values = of_token.unsqueeze(2).expand(-1, -1, self.num_heads, -1)
        both = torch.cat((v, values), dim=-1)
        rough = attend(q, k, both, "elu", grid, backend=self.backend)
        hidden = F.gelu(heads_matrix(torch.cat((q, rough), dim=-1), self.estimate_in))
        logits = heads_matrix(hidden, self.estimate_out)  # [B, N, h, K]
        occupied = (of_segment.sum(1) > 0)[:, None, None]
        logits = hidden_scores(logits, occupied)
        best = logits.detach().topk(self.kept, dim=-1).indices
        keep = torch.zeros_like(logits).scatter(-1, best, 1.0) * occupied
        estimate = logits.softmax(-1).clamp(min=1e-6).log()
        # To tokens: what a query may see, and how the estimate weighs it.
        spread = of_token.transpose(1, 2).unsqueeze(1)  # [B, 1, K, N]
        seen = (keep.transpose(1, 2) @ spread) > 0.5
        bias = estimate.transpose(1, 2) @ spread
        if prefix:
            first = torch.arange(grid.length, device=q.device) < prefix
            if grid.key_padding_mask is not None:
                first = first & ~grid.key_padding_mask[:, None, None]
            seen = seen | first
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * self.head_dim**-0.5
        weights = hidden_scores(scores + bias, seen).softmax(-1)
        exact = (weights @ v.transpose(1, 2)).transpose(1, 2)
        share = heads_matrix(q, self.mix_weight) + self.mix_bias.to(q.dtype)
        share = share.sigmoid()
        return share * exact + (1 - share) * grid.mean(v)

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """Query by query; see `Mixer.definition`."""
        prefix, area = grid.num_prefix_tokens, grid.height * grid.width
        number = [-1] * prefix + [i * self.segments // area for i in range(area)]
        place = torch.tensor(number)
        one_hot = F.one_hot(place.clamp(min=0), self.segments).to(q.dtype)
        one_hot = one_hot * (place >= 0).unsqueeze(-1)
        values = torch.cat((v, one_hot[None, :, None].expand(*v.shape[:3], -1)), dim=-1)
        pairs = torch.einsum("bnhd,bmhd->bhnm", F.elu(q) + 1, F.elu(k) + 1) / q.shape[1]
        pairs = pairs / (pairs.sum(-1, keepdim=True) + 1e-6)
        rough = torch.einsum("bhnm,bmhd->bnhd", pairs, values)
        hidden = torch.einsum("bnhd,hde->bnhe", torch.cat((q, rough), -1), self.estimate_in)
        logits = torch.einsum("bnhd,hde->bnhe", F.gelu(hidden), self.estimate_out)
        occupied = sorted(set(number[prefix:]))
        outs = []
        for i in range(grid.length):
            heads = []
            for h in range(self.num_heads):
                images = []
                for b in range(q.shape[0]):
                    of_query = logits[b, i, h]
                    ranked = sorted(occupied, key=lambda c: -of_query.detach()[c].item())[
                        : self.kept
                    ]
                    share = of_query[occupied].softmax(-1)
                    keys = [n for n, c in enumerate(number) if c < 0 or c in ranked]
                    scores = k[b, keys, h] @ q[b, i, h] * self.head_dim**-0.5
                    bias = [
                        share[occupied.index(number[n])].clamp(min=1e-6).log()
                        if number[n] >= 0
                        else q.new_zeros(())
                        for n in keys
                    ]
                    weights = (scores + torch.stack(bias)).softmax(-1)
                    exact = weights @ v[b, keys, h]
                    part = (q[b, i, h] @ self.mix_weight[h] + self.mix_bias[h]).sigmoid()
                    images.append(part * exact + (1 - part) * v[b, :, h].mean(0))
                heads.append(torch.stack(images))
            outs.append(torch.stack(heads, dim=1))
        return torch.stack(outs, dim=1)
