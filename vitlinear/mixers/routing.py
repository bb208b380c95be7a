"""Routing attention: softmax inside of clusters of tokens that are alike."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear.ops import accumulation_dtype

from .description import AttentionDescription, Option
from .grid import Grid
from .mixer import Mixer
from .registry import register


@register(
    AttentionDescription(
        name="routing",
        formula="mean over clusters c of softmax(s u_i u'^T) v, among the N / C keys nearest to c",
        paper="arXiv:2003.05997",
        title="Efficient Content-Based Sparse Attention with Routing Transformers",
        year=2020,
        cost="2 N^2 D / C + 4 N C D, C clusters",
        state="2 N D",
        order="free",
        positive=True,
        rows_sum_to_one=False,
        query_magnitude=False,
        injective=False,
        options={
            "clusters": Option(8, "C, of each head", 1, 256),
            "momentum": Option(0.999, "of the centroids in training", 0.0, 1.0),
        },
        most_tokens=2**15,
        origin="Non-causal, without the local heads of the paper, which `diag_attention` is. "
        "Queries and keys have norms of their own and are assigned each by itself; a query of no "
        "cluster gets 0. The root of N clusters would cost N^1.5; a number that is fixed costs "
        "N^2 / C.",
    )
)
class Routing(Mixer):
    """Windows by content: each centroid gathers the N / C queries and the N / C keys nearest to it.

    Queries and keys go through a LayerNorm without weights, whose result has the length D^0.5, so
    products rank as distances do. Clusters have one size; a token may lie in several, whose outputs
    are averaged, or in none. Centroids are a moving average of the tokens that they gathered, in
    training alone, and no parameters. They are float32 or float64 in a model of any type: half
    types would round a small move away. Source: arXiv:2003.05997, from general knowledge.
    """

    moves_in_training = ("centroids",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        clusters: int = 8,
        momentum: float = 0.999,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend=backend, device=device, dtype=dtype)
        self.clusters = clusters
        self.momentum = momentum
        shape = (num_heads, clusters, self.head_dim)
        wide = accumulation_dtype(dtype or torch.get_default_dtype())
        self.centroids: Tensor
        self.register_buffer("centroids", torch.empty(shape, device=device, dtype=wide))
        self.reset_parameters()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Do to all parameters and buffers what ``to``, ``half`` and their like do."""
        before = self.centroids
        super()._apply(fn, recurse)
        wide = accumulation_dtype(self.centroids.dtype)
        if wide != self.centroids.dtype:
            self.centroids = before.to(self.centroids.device, wide)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """Load, with ``assign=True`` too, which would take centroids of a half type as they are."""
        before = self.centroids.dtype
        super()._load_from_state_dict(*args)
        wide = torch.promote_types(before, self.centroids.dtype)
        self.centroids = self.centroids.to(wide)

    def reset_parameters(self) -> None:
        """Random directions of the length of tokens."""
        nn.init.normal_(self.centroids)
        with torch.no_grad():
            self.centroids.copy_(F.layer_norm(self.centroids.float(), (self.head_dim,)))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        length, count = q.shape[1], grid.number(q)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        q, k = F.layer_norm(q, q.shape[-1:]), F.layer_norm(k, k.shape[-1:])
        most = -(-length // self.clusters)
        # With padding, clusters are those of the tokens that there are.
        size = torch.as_tensor((count + self.clusters - 1) // self.clusters, device=q.device)
        within = torch.arange(most, device=q.device) < size.reshape(-1, 1, 1, 1)

        def nearest(x: Tensor) -> Tensor:
            near = self.centroids.to(x.dtype) @ x.detach().transpose(-1, -2)  # [B, h, C, N]
            if grid.key_padding_mask is not None:
                near = near.masked_fill(grid.key_padding_mask[:, None, None], -torch.inf)
            return near.topk(most, dim=-1).indices

        def gathered(x: Tensor, index: Tensor) -> Tensor:
            index = index.flatten(2).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
            return x.gather(2, index).unflatten(2, (self.clusters, most))

        of_q, of_k = nearest(q), nearest(k)
        keys, values, queries = gathered(k, of_k), gathered(v, of_k), gathered(q, of_q)
        if self.training:
            self.check_recomputation()
            self.move(queries, keys, within)
        logits = queries @ keys.transpose(-1, -2) * self.head_dim**-0.5
        logits = logits.masked_fill(~within.unsqueeze(-2), -torch.inf)
        out = logits.softmax(-1) @ values  # [B, h, C, most, D]
        counted = within.to(q.dtype).unsqueeze(-1).expand(*out.shape[:-1], 1)
        index = of_q.flatten(2).unsqueeze(-1)
        total = torch.zeros_like(v).scatter_add(
            2, index.expand(-1, -1, -1, v.shape[-1]), (out * counted).flatten(2, 3)
        )
        times = torch.zeros_like(v[..., :1]).scatter_add(2, index, counted.flatten(2, 3))
        return (total / times.clamp(min=1)).transpose(1, 2)

    @torch.no_grad()
    def move(self, queries: Tensor, keys: Tensor, within: Tensor) -> None:
        """Centroids a little towards the tokens that they gathered.

        Args:
            queries: [B, h, C, most, D].
            keys: Likewise.
            within: Which of those count, broadcasts to [B, h, C, most].
        """
        weights = within.to(queries.dtype).expand(queries.shape[:-1]).unsqueeze(-1)
        number = weights.sum((0, 3))
        mean = ((queries + keys) * weights).sum((0, 3)) / (2 * number.clamp(min=1))
        # One batch that overflowed, or is empty, would be in the average for good.
        counts = mean.isfinite().all(-1, keepdim=True) & (number > 0)
        mean = torch.where(counts, mean.to(self.centroids.dtype), self.centroids)
        self.centroids.lerp_(mean, 1 - self.momentum)

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """Cluster by cluster; see `Mixer.definition`."""
        q, k = (F.layer_norm(t, t.shape[-1:]) for t in (q, k))
        size = -(-q.shape[1] // self.clusters)
        total, times = torch.zeros_like(v), torch.zeros_like(v[..., :1])
        for image in range(q.shape[0]):
            for head in range(self.num_heads):
                for centroid in self.centroids[head].to(q.dtype):
                    query, key, value = (t[image, :, head] for t in (q, k, v))
                    members = (query @ centroid).argsort(descending=True)[:size]
                    seen = (key @ centroid).argsort(descending=True)[:size]
                    scores = query[members] @ key[seen].T * self.head_dim**-0.5
                    index = (torch.tensor(image), members, torch.tensor(head))
                    out = scores.softmax(-1) @ value[seen]
                    total = total.index_put(index, out, accumulate=True)
                    ones = torch.ones_like(out[:, :1])
                    times = times.index_put(index, ones, accumulate=True)
        return total / times.clamp(min=1)
