"""Agent attention: a few pooled queries gather from all tokens, and all tokens ask them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlinear.layers.conv.depthwise_conv import DepthwiseConv

from .convolution import local_values, naive_convolution
from .description import AttentionDescription, Option
from .grid import Grid
from .mixer import Mixer
from .registry import register


def pooling_matrix(size: Tensor, bins: int, length: int, dtype: torch.dtype) -> Tensor:
    """Weights of adaptive average pooling along a side, [B, bins, length].

    Args:
        size: Places of the side that count, [B] integers, from 1 to length.
        bins: Results; bin i averages places from floor(i size / bins) to ceil((i + 1) size / bins).
        length: Places of the side.
        dtype: Of the weights.
    """
    i = torch.arange(bins, device=size.device)
    start = (i * size[:, None]) // bins
    stop = ((i + 1) * size[:, None] + bins - 1) // bins
    place = torch.arange(length, device=size.device)
    inside = (place >= start[..., None]) & (place < stop[..., None])
    return inside.to(dtype) / (stop - start)[..., None].to(dtype)


def map_sizes(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of each map that hold a token that is no padding, [B] or [1], at least 1."""
    mask = grid.key_padding_mask
    if mask is None:
        height = torch.full((1,), grid.height, device=device)
        return height, torch.full((1,), grid.width, device=device)
    valid = ~grid.split(mask)[1]
    return tuple(valid.any(axis).sum(1).clamp(min=1) for axis in (2, 1))  # type: ignore[return-value]


@register(
    AttentionDescription(
        name="agent",
        formula="softmax(s q a^T) softmax(s a k^T) v + conv(v), a = pooled q",
        paper="arXiv:2312.08874",
        title="Agent Attention: On the Integration of Softmax and Linear Attention",
        year=2023,
        cost="4 N n D, n agents",
        state="2 n D",
        order="local",
        positive=False,
        rows_sum_to_one=False,
        query_magnitude=True,
        injective=False,
        options={"agents": Option(7, "side of the square of agents", 1, 32)},
        origin="Without the paper's biases of agents, whose tables belong to one size of the map.",
    )
)
class Agent(Mixer):
    """Two softmax attentions through n agents, which are averages of queries in n parts of the map.

    A 3 x 3 depthwise convolution of the values is added. Tokens before the map ask and are asked,
    and are no agents. Source: arXiv:2312.08874, equations 5 and 6.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        agents: int = 7,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend=backend, device=device, dtype=dtype)
        self.agents = agents
        self.local = DepthwiseConv(dim, 3, device=device, dtype=dtype)

    def pooled(self, q: Tensor, grid: Grid) -> Tensor:
        """Agents, [B, n, h, D]."""
        rows, cols = map_sizes(grid, q.device)
        down = pooling_matrix(rows, self.agents, grid.height, q.dtype)
        across = pooling_matrix(cols, self.agents, grid.width, q.dtype)
        image = grid.split(q)[1].flatten(3)
        image = torch.einsum("bix,byxc->byic", across.expand(q.shape[0], -1, -1), image)
        image = torch.einsum("bjy,byic->bjic", down.expand(q.shape[0], -1, -1), image)
        return image.flatten(1, 2).unflatten(-1, (self.num_heads, self.head_dim))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        agents = self.pooled(q, grid) * self.head_dim**-0.5
        logits = torch.einsum("bnhd,bmhd->bmhn", agents, k)  # tokens first, as `Grid` wants
        gathered = torch.einsum("bmhn,bmhd->bnhd", grid.token_softmax(logits), v)
        weights = torch.einsum("bnhd,bmhd->bnhm", q, agents).softmax(-1)
        out = torch.einsum("bnhm,bmhd->bnhd", weights, gathered)
        return out + local_values(self.local, v, grid)

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """Both matrices, with PyTorch's pooling; see `Mixer.definition`."""
        scale = self.head_dim**-0.5
        image = grid.split(q)[1].flatten(3).permute(0, 3, 1, 2)
        agents = F.adaptive_avg_pool2d(image, self.agents).flatten(2).transpose(1, 2)
        agents = agents.reshape(q.shape[0], -1, self.num_heads, self.head_dim)
        first = (torch.einsum("bnhd,bmhd->bhnm", q, agents) * scale).softmax(-1)
        second = (torch.einsum("bnhd,bmhd->bhnm", agents, k) * scale).softmax(-1)
        out = torch.einsum("bhnm,bmhd->bnhd", first @ second, v)
        prefix, values = grid.split(v)
        return out + grid.join(prefix * 0, naive_convolution(self.local, values))
