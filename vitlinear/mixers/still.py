"""STILL: keys that say much about themselves stay exact for all queries, the rest is linear."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlinear.ops.features import softmax_halves

from .description import AttentionDescription, Option
from .grid import Grid
from .grid_windows import GridWindows, prefix_attention, same_window
from .lolcats import exact_keys, naive_shared, shared_sums
from .mixer import Mixer
from .norms import heads_matrix, identity_matrices, length, unit
from .registry import register


def self_saliency(scores: Tensor, places: Tensor) -> Tensor:
    """How much a token's own key changes its softmax: sum_j a_j log((a_j + e) / (b_j + e)).

    a is the softmax with the token's own score and b the one without, e = 1e-6. A token alone has
    no b, which is 0 for it.

    Args:
        scores: Of each token to the keys of its window, [..., T, keys], -inf for what is not there.
        places: Which key is the token's own, [T, keys] bool.

    Returns:
        [..., T].
    """
    with_own = scores.softmax(-1)
    others = scores.masked_fill(places, -torch.inf)
    alone = torch.isneginf(others).all(-1, keepdim=True)
    without = others.masked_fill(alone, 0).softmax(-1).masked_fill(places | alone, 0)
    return (with_own * ((with_own + 1e-6) / (without + 1e-6)).log()).sum(-1)


@register(
    AttentionDescription(
        name="still",
        formula="(exp(s q k^T - m) v, exact keys + g f(q) f(k)^T v, the rest) / (the same sums)",
        paper="github.com/ZacharyMeng/STILL",
        title="STILL: Selecting Tokens for Intra-Layer Hybrid Attention to Linearize LLMs",
        year=2026,
        cost="8 N D^2 + 4 N (w^2 + K) D, w the side of a window, K exact keys",
        state="2 D (D + 1) + 2 K D",
        order="local",
        positive=True,
        rows_sum_to_one=False,
        query_magnitude=True,
        injective=False,
        backends=("eager", "library", "triton"),
        options={
            "window": Option(8, "side of a window", 1, 64),
            "keys_per_window": Option(4, "exact keys that a window offers", 1, 64),
            "most_keys": Option(64, "exact keys of the whole map, the most salient ones", 1),
        },
        origin="Windows of 8 x 8 for chunks of 64. A bound of the exact keys keeps the cost "
        "linear; heads choose for themselves. The gate g is a parameter of each channel. Tokens "
        "before the map are seen exactly, and see all tokens by softmax.",
    )
)
class Still(Mixer):
    """Softmax over the own window and over chosen keys, and the norm-preserving map for the rest.

    NP-Map: u = |x| W y / |W y| with y = x - 2 (x . r) r a reflection by a learned unit vector, and
    f(x) = [softmax(u); softmax(-u)], so the length of x decides how sharp f is. A token is salient
    where its own key changes its softmax over the window (`self_saliency`). W begins as the
    identity. Source: the released code.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 8,
        keys_per_window: int = 4,
        most_keys: int = 64,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend=backend, device=device, dtype=dtype)
        self.window = window
        self.keys_per_window = keys_per_window
        self.most_keys = most_keys
        width = self.head_dim
        self.query_weight, self.key_weight = (
            nn.Parameter(torch.empty(num_heads, width, width, device=device, dtype=dtype))
            for _ in range(2)
        )
        self.query_mirror, self.key_mirror, self.gate = (
            nn.Parameter(torch.empty(num_heads, width, device=device, dtype=dtype))
            for _ in range(3)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Identity matrices, random mirrors, and a gate of a half."""
        for weight in (self.query_weight, self.key_weight):
            identity_matrices(weight)
        for mirror in (self.query_mirror, self.key_mirror):
            nn.init.normal_(mirror)
        nn.init.zeros_(self.gate)

    def features(self, x: Tensor, weight: Tensor, mirror: Tensor) -> Tensor:
        """NP-Map, [B, N, h, D] -> [B, N, h, 2 D]."""
        mirror = unit(mirror.to(x.dtype))
        y = x - 2 * (x * mirror).sum(-1, keepdim=True) * mirror
        return softmax_halves(unit(heads_matrix(y, weight)) * length(x))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        windows, prefix = GridWindows(grid, self.window), grid.num_prefix_tokens
        features = (
            self.features(q, self.query_weight, self.query_mirror),
            self.features(k, self.key_weight, self.key_mirror),
        )
        near = exact_keys(q, k, v, features, windows)
        chosen, window = self.chosen(near[0][..., prefix:], windows.present(q))
        # Chosen keys as one more window that all queries look at, but for those of its own.
        shape = (q.shape[0], self.num_heads, windows.count * windows.length)
        keys, key_features, key_values = (
            windows.cut(x)
            .permute(0, 3, 1, 2, 4)
            .reshape(*shape, x.shape[-1])
            .gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))
            .unsqueeze(1)
            for x in (k, features[1], v)
        )
        number = torch.arange(windows.count, device=q.device)[:, None, None]
        seen = ((window.unsqueeze(1) != number) & (window >= 0).unsqueeze(1)).unsqueeze(3)
        own = [windows.cut(x).transpose(2, 3) for x in (q, features[0])]
        scores = own[0] @ keys.transpose(-1, -2) * self.head_dim**-0.5
        similar = (own[1] @ key_features.transpose(-1, -2)).masked_fill(~seen, 0)
        far = scores.masked_fill(~seen, -torch.inf), similar, key_values
        gate = self.gate.to(q.dtype).sigmoid()[:, None]
        out = shared_sums(features, [near, far], v, grid, windows, 1.0, gate, self.backend)
        return torch.cat((prefix_attention(q, k, v, grid), out), dim=1) if prefix else out

    @torch.no_grad()
    def chosen(self, scores: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """The keys that all queries see.

        Args:
            scores: Of tokens in their windows, [B, M, h, T, T], -inf for what is not there.
            present: Which tokens of the windows there are, [B, M, T].

        Returns:
            Their places among the tokens of all windows, and the number of their window, -1 for
            what stands for none; [B, h, K] each.
        """
        count, length = present.shape[1:]
        own = torch.eye(length, dtype=torch.bool, device=scores.device)
        saliency = self_saliency(scores, own).transpose(1, 2)  # [B, h, M, T]
        saliency = saliency.masked_fill(~present.unsqueeze(1), -torch.inf)
        best = saliency.topk(min(self.keys_per_window, length), dim=-1)
        offset = torch.arange(count, device=scores.device)[:, None] * length
        value, place = best.values.flatten(2), (best.indices + offset).flatten(2)
        if value.shape[-1] > self.most_keys:
            value, kept = value.topk(self.most_keys, dim=-1)
            place = place.gather(-1, kept)
        return place, (place // length).masked_fill(torch.isneginf(value), -1)

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """One masked quadratic form; see `Mixer.definition`."""
        prefix = grid.num_prefix_tokens
        halves = []
        for t, weight, mirror in (
            (q, self.query_weight, self.query_mirror),
            (k, self.key_weight, self.key_mirror),
        ):
            r = mirror / mirror.norm(dim=-1, keepdim=True)
            y = t - 2 * torch.einsum("bnhd,hd,he->bnhe", t, r, r)
            u = torch.einsum("bnhd,hde->bnhe", y, weight)
            u = u / u.norm(dim=-1, keepdim=True) * t.norm(dim=-1, keepdim=True)
            halves.append(torch.cat((u.softmax(-1), (-u).softmax(-1)), dim=-1))
        near = same_window(grid, self.window, q.device).expand(*q.shape[::2], -1, -1).clone()
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k).detach() * self.head_dim**-0.5
        window = near[0, 0, prefix:, prefix:].clone()
        for image in range(q.shape[0]):
            for head in range(self.num_heads):
                offers: list[tuple[float, int]] = []
                for members in window.unique(dim=0):
                    tokens = members.nonzero().flatten() + prefix
                    block = scores[image, head][tokens][:, tokens]
                    own = torch.eye(len(tokens), dtype=torch.bool)
                    value, place = self_saliency(block, own).topk(
                        min(self.keys_per_window, len(tokens))
                    )
                    offers += zip(value.tolist(), tokens[place].tolist(), strict=True)
                for _, token in sorted(offers, reverse=True)[: self.most_keys]:
                    near[image, head, :, token] = True
        gate = self.gate.sigmoid()
        return naive_shared(q, k, v, halves, near, grid, 1.0, gate, False)
