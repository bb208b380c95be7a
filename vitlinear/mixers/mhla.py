"""MHLA: blocks of the map keep states of their own, which each block mixes for its queries."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear.ops import (
    LinearAttentionState,
    linear_attention_state,
    read_linear_attention_state,
)

from .agent import map_sizes
from .description import AttentionDescription, Option
from .grid import Grid
from .mixer import Mixer
from .registry import register


class Blocks(NamedTuple):
    """Blocks of the tokens of a grid: a square of them on the map, and one of those before it.

    Attributes:
        members: Tokens of each block, [B or 1, M, T].
        present: Which of those there are, likewise, bool.
        block: Block of each token, [B or 1, N].
        place: Its place in the block, likewise.
    """

    members: Tensor
    present: Tensor
    block: Tensor
    place: Tensor

    def cut(self, x: Tensor) -> Tensor:
        """Tokens [B, N, h, D] -> [B M, T, h, D]."""
        batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
        return x[batch, self.members].flatten(0, 1)

    def join(self, x: Tensor) -> Tensor:
        """The inverse of `cut`."""
        x = x.unflatten(0, (-1, self.members.shape[1]))
        batch = torch.arange(x.shape[0], device=x.device)[:, None]
        return x[batch, self.block, self.place]


def blocks_of(grid: Grid, side: int, device: torch.device) -> Blocks:
    """Cut the valid part of every map into side x side blocks of ceil(rows / side) rows.

    Args:
        grid: Where the tokens stand.
        side: Blocks along each side of the map.
        device: Where the numbers are wanted.
    """
    prefix, height, width = grid.num_prefix_tokens, grid.height, grid.width
    sizes = map_sizes(grid, device)
    rows, cols = ((size + side - 1) // side for size in sizes)  # of a block, [B]
    most_rows, most_cols = -(-height // side), -(-width // side)
    length = max(most_rows * most_cols, prefix)
    number = torch.arange(side * side, device=device)[:, None]
    place = torch.arange(length, device=device)
    row = place // most_cols
    col = place - row * most_cols
    rows, cols = rows[:, None, None], cols[:, None, None]
    y, x = number // side * rows + row, number % side * cols + col  # [B, M, T]
    inside = (row < rows) & (col < cols) & (y < height) & (x < width)
    index = prefix + y.clamp(max=height - 1) * width + x.clamp(max=width - 1)
    first = place.clamp(max=max(prefix - 1, 0)).expand(index.shape[0], 1, -1)
    index = torch.cat((index, first), dim=1)
    present = torch.cat((inside, (place < prefix).expand(index.shape[0], 1, -1)), dim=1)
    if grid.key_padding_mask is not None:
        batch = torch.arange(index.shape[0], device=device)[:, None, None]
        present = present & ~grid.key_padding_mask[batch, index]

    y = torch.arange(height, device=device)[:, None].expand(height, width).flatten()
    x = torch.arange(width, device=device).repeat(height)
    rows, cols = rows[:, 0], cols[:, 0]
    block = (y // rows).clamp(max=side - 1) * side + (x // cols).clamp(max=side - 1)
    place = (y % rows) * most_cols + x % cols
    first = torch.arange(prefix, device=device).expand(block.shape[0], -1)
    block = torch.cat((torch.full_like(first, side * side), block), dim=1)
    return Blocks(index, present, block, torch.cat((first, place), dim=1))


@register(
    AttentionDescription(
        name="mhla",
        formula="f(q) S_b / (f(q) m_b), S_b = sum_c w_bc sum_(j in c) f(k_j) v_j^T, f = elu + 1",
        paper="arXiv:2601.07832",
        title="MHLA: Restoring Expressivity of Linear Attention via Token-Level Multi-Head",
        year=2026,
        cost="2 N D^2 + M^2 D^2, M blocks",
        state="M D (D + 1)",
        order="local",
        positive=True,
        rows_sum_to_one=True,
        query_magnitude=True,
        injective=False,
        backends=("eager", "library", "triton"),
        options={"blocks_per_side": Option(4, "blocks along each side of the map", 1, 16)},
        origin="Weights w are a softmax of a table over the blocks, near ones the greatest at "
        "first, in each head; tokens before the map are a block of their own. General knowledge of "
        "the paper.",
    )
)
class Mhla(Mixer):
    """Linear attention with a state of each block of the map, and a mixture of them for each block.

    The map has a fixed number of blocks, whatever its size: a block has ceil(H / 4) rows, and the
    last ones may be short or empty. So the table of mixing weights fits every map. It begins as
    minus the distance of the blocks.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        blocks_per_side: int = 4,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend=backend, device=device, dtype=dtype)
        self.blocks_per_side = blocks_per_side
        count = blocks_per_side**2 + 1
        self.mixing = nn.Parameter(torch.empty(num_heads, count, count, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Near blocks first."""
        with torch.no_grad():
            count, device = self.blocks_per_side, self.mixing.device
            side = torch.arange(count, device=device, dtype=torch.float32)
            places = torch.cartesian_prod(side, side).reshape(-1, 2)
            self.mixing.zero_()
            self.mixing[:, :-1, :-1] = -(places[:, None] - places).norm(dim=-1)

    def weights(self, grid: Grid, dtype: torch.dtype) -> Tensor:
        """w, [h, M + 1, M + 1]; without tokens before the map, the last block gets none."""
        logits = self.mixing.to(dtype)
        if grid.num_prefix_tokens == 0:
            logits = torch.cat((logits[..., :-1], logits[..., -1:] * 0 - torch.inf), dim=-1)
        return logits.softmax(-1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        blocks = blocks_of(grid, self.blocks_per_side, q.device)
        absent = ~blocks.present.expand(q.shape[0], -1, -1).flatten(0, 1)
        state = linear_attention_state(
            blocks.cut(k), blocks.cut(v), mechanism="elu", key_padding_mask=absent,
            backend=self.backend,
        )  # fmt: skip
        # Means of blocks as sums: their sizes differ.
        shape = (q.shape[0], blocks.members.shape[1])
        count = (~absent).sum(1).to(q.dtype).unflatten(0, shape)
        count = (count / count.sum(1, keepdim=True).clamp(min=1)).flatten()
        weights = self.weights(grid, q.dtype)

        def mixed(x: Tensor | None) -> Tensor:
            assert x is not None
            x = (x * count[:, None, None, None]).unflatten(0, shape)
            return torch.einsum("hbc,nchde->nbhde", weights, x).flatten(0, 1)

        own = LinearAttentionState(mixed(state.state), mixed(state.norm))
        out = read_linear_attention_state(blocks.cut(q), own, mechanism="elu", backend=self.backend)
        return blocks.join(out)

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """The quadratic form; see `Mixer.definition`."""
        side, prefix = self.blocks_per_side, grid.num_prefix_tokens
        rows, cols = -(-grid.height // side), -(-grid.width // side)
        block = [side * side] * prefix
        for y in range(grid.height):
            block += [y // rows * side + x // cols for x in range(grid.width)]
        mixing = self.mixing if prefix else self.mixing[:, :, :-1]
        weights = mixing.softmax(-1)[:, block][:, :, block]
        weights = weights * torch.einsum("bnhd,bmhd->bhnm", F.elu(q) + 1, F.elu(k) + 1)
        weights = weights / q.shape[1]
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
        return torch.einsum("bhnm,bmhd->bnhd", weights, v)
