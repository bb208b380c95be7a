"""LoLCATs and STILL: softmax where it counts, linear attention for the rest, one denominator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlinear.ops.features import softmax_halves

from .description import AttentionDescription, Option
from .grid import Grid
from .grid_windows import GridWindows, hidden_scores, prefix_attention, same_window
from .hedgehog import softmax_halves_definition
from .mixer import Mixer
from .norms import heads_matrix, identity_matrices
from .operator import attend
from .registry import register

EPS = 1e-6  # of the shared denominator


def exact_keys(
    q: Tensor, k: Tensor, v: Tensor, features: tuple[Tensor, Tensor], windows: GridWindows
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, products of features and values of the keys that windows see exactly.

    Args:
        q: Queries, [B, N, h, D].
        k: Keys.
        v: Values.
        features: Of queries and keys, [B, N, h, F].
        windows: Whose tokens, with those before the map, are seen.

    Returns:
        Scores s q . k, [B, M, h, T, P + T], -inf for what is not there; products, 0 for what is not
        there; values, [B, M, h, P + T, D].
    """
    seen, own = windows.seen(q), [windows.cut(x).transpose(2, 3) for x in (q, features[0])]
    scores = own[0] @ windows.keys(k).transpose(-1, -2) * q.shape[-1] ** -0.5
    similar = own[1] @ windows.keys(features[1]).transpose(-1, -2)
    return hidden_scores(scores, seen), similar.masked_fill(~seen, 0), windows.keys(v)


def shared_sums(
    features: tuple[Tensor, Tensor],
    exact_parts: list[tuple[Tensor, Tensor, Tensor]],
    v: Tensor,
    grid: Grid,
    windows: GridWindows,
    share: Tensor | float,
    gate: Tensor | float,
    backend: str,
    scale_rest: bool = False,
) -> Tensor:
    """Softmax of exact keys and features of all others over one denominator, [B, H W, h, D].

    The sums of all keys come from the operator. Those of the keys that a query sees exactly are
    taken off again beside their softmax.

    Args:
        features: Of queries and keys, [B, N, h, F].
        exact_parts: Of exact keys their scores, [B, M, h, T, keys], -inf for those that are not
            seen; products of features of the same, 0 for those that are not seen; and their values,
            [B, M or 1, h, keys, D].
        v: All values, [B, N, h, D].
        grid: Where the tokens stand.
        windows: Of the queries.
        share: Factor of the softmax, broadcasts to [h, 1, 1].
        gate: Factor of the values of the rest, broadcasts to [h, 1, D].
        backend: One of `vitlinear.ops.BACKENDS`.
        scale_rest: Whether the rest takes the shift of the softmax, so that it does not matter.
    """
    q, k = features[0], grid.hide(features[1])
    total = attend(q, k, v, "identity", grid, backend=backend) * grid.number(q)
    mass = (q * k.sum(1, keepdim=True)).sum(-1, keepdim=True)
    total, mass = (windows.cut(x).transpose(2, 3) for x in (total, mass))
    shift = exact_parts[0][0].amax(-1, keepdim=True)
    for scores, _, _ in exact_parts[1:]:
        shift = torch.maximum(shift, scores.amax(-1, keepdim=True))
    if scale_rest:
        shift = shift.clamp(min=0)  # neither half overflows
    softmax, exact_mass = torch.zeros_like(total), torch.zeros_like(mass)
    for scores, similar, values in exact_parts:
        exact = share * (scores - shift).exp()
        softmax = softmax + exact @ values
        exact_mass = exact_mass + exact.sum(-1, keepdim=True)
        total = total - similar @ values
        mass = mass - similar.sum(-1, keepdim=True)
    # A difference of sums errs by their rounding; a mass below 0 would be nothing else.
    mass = mass.clamp(min=0)
    if scale_rest:
        total, mass = total * (-shift).exp(), mass * (-shift).exp()
    out = (softmax + gate * total) / (exact_mass + mass + EPS)
    return windows.join(out.transpose(2, 3))


def naive_shared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: list[Tensor],
    near: Tensor,
    grid: Grid,
    share: Tensor | float,
    gate: Tensor | float,
    scale_rest: bool,
) -> Tensor:
    """`shared_sums` as one masked quadratic form, with softmax for the tokens before the map.

    Args:
        q: Queries, [B, N, h, D].
        k: Keys.
        v: Values.
        features: Of queries and keys, [B, N, h, F].
        near: Pairs that see each other exactly, broadcasts to [B, h, N, N] bool.
        grid: Where the tokens stand.
        share: Factor of the softmax, [h] or a number.
        gate: Factor of the values of the rest, [h, D] or a number.
        scale_rest: As `shared_sums`.
    """
    prefix = grid.num_prefix_tokens
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    first = torch.einsum("bhnm,bmhd->bnhd", scores[:, :, :prefix].softmax(-1), v)
    scores = scores.masked_fill(~near, -torch.inf)
    shift = scores.amax(-1, keepdim=True)
    rest = torch.einsum("bnhd,bmhd->bhnm", *features).masked_fill(near, 0)
    if scale_rest:
        shift = shift.clamp(min=0)
        rest = rest * (-shift).exp()
    share = share[:, None, None] if isinstance(share, Tensor) else share
    exact = share * (scores - shift).exp()
    norm = (exact + rest).sum(-1).transpose(1, 2).unsqueeze(-1) + EPS
    out = torch.einsum("bhnm,bmhd->bnhd", exact, v)
    out = (out + gate * torch.einsum("bhnm,bmhd->bnhd", rest, v)) / norm
    return torch.cat((first, out[:, prefix:]), dim=1)


@register(
    AttentionDescription(
        name="lolcats",
        formula="(a exp(s q k^T - m) v in the window + f(q) f(k)^T v outside) / (the same sums)",
        paper="arXiv:2410.10254",
        title="LoLCATs: On Low-Rank Linearizing of Large Language Models",
        year=2024,
        cost="8 N D^2 + 4 N w^2 D, w the side of a window",
        state="2 D (D + 1)",
        order="local",
        positive=True,
        rows_sum_to_one=True,
        query_magnitude=True,
        injective=False,
        backends=("eager", "library", "triton"),
        options={
            "window": Option(8, "side of a window", 1, 64),
            "scale_rest": Option(
                False, "whether what is outside takes the shift m too, which then does not matter"
            ),
        },
        origin="Windows of the map for blocks of the text. m is the greatest score of a query in "
        "its window; as released, it shifts the softmax alone. Tokens before the map are seen "
        "exactly, and see all tokens by softmax.",
    )
)
class Lolcats(Mixer):
    """Softmax in the window and the map [softmax(W x); softmax(-W x)] for all other keys.

    a = sigmoid of a parameter of each head, 0 at first. W, for queries and keys apart and for each
    head, begins as the identity. Source: the released code of arXiv:2410.10254.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 8,
        scale_rest: bool = False,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend=backend, device=device, dtype=dtype)
        self.window = window
        self.scale_rest = scale_rest
        shape = (num_heads, self.head_dim, self.head_dim)
        self.query_weight, self.key_weight = (
            nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for _ in range(2)
        )
        self.share = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Identity maps, and a share of a half."""
        for weight in (self.query_weight, self.key_weight):
            identity_matrices(weight)
        nn.init.zeros_(self.share)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        windows, prefix = GridWindows(grid, self.window), grid.num_prefix_tokens
        features = (
            softmax_halves(heads_matrix(q, self.query_weight)),
            softmax_halves(heads_matrix(k, self.key_weight)),
        )
        near = exact_keys(q, k, v, features, windows)
        share = self.share.to(q.dtype).sigmoid()[:, None, None]
        out = shared_sums(
            features, [near], v, grid, windows, share, 1.0, self.backend, self.scale_rest
        )
        return torch.cat((prefix_attention(q, k, v, grid), out), dim=1) if prefix else out

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """Both quadratic forms under their masks; see `Mixer.definition`."""
        near = same_window(grid, self.window, q.device)
        halves = [
            softmax_halves_definition(q, self.query_weight),
            softmax_halves_definition(k, self.key_weight),
        ]
        return naive_shared(q, k, v, halves, near, grid, self.share.sigmoid(), 1.0, self.scale_rest)
