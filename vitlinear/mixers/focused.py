"""Focused linear attention of FLatten Transformer, and the ReLU attention of EfficientViT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear.layers.band import BANDED
from vitlinear.layers.conv.depthwise_conv import DepthwiseConv
from vitlinear.layers.init_normal import init_normal_
from vitlinear.layers.linear import Linear

from .convolution import convolved_tokens, local_values, naive_convolution
from .description import AttentionDescription, Option
from .grid import Grid
from .mixer import Mixer
from .norms import heads_matrix, length, unit
from .operator import attend
from .registry import register

BACKENDS = ("eager", "library", "triton")


@register(
    AttentionDescription(
        name="focused",
        formula="f(q) S / (f(q) m) + conv(v), f(x) = |y| y^p / |y^p|, y = ReLU(x) / softplus(c)",
        paper="arXiv:2308.00442",
        title="FLatten Transformer: Vision Transformer using Focused Linear Attention",
        year=2023,
        cost="2 N D^2",
        state="D (D + 1)",
        order="local",
        positive=False,
        rows_sum_to_one=False,
        query_magnitude=False,
        injective=False,
        backends=BACKENDS,
        options={
            "power": Option(3, "p, the focusing factor", 1, 8),
            "kernel_size": Option(5, "side of the convolution of the values, odd", 1, 15),
        },
        origin="Norms run over the channels of a head.",
    )
)
class Focused(Mixer):
    """Linear attention with features turned towards the nearest axes, and a convolution of values.

    Features keep the length of y and take the direction of its powers. c is a scale of each
    channel, 0 at first, and 1e-6 is added to ReLU(x). Source: arXiv:2308.00442, equations 4 to 8;
    scale and offset from general knowledge of its code.
    """

    row_rule = BANDED

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        power: int = 3,
        kernel_size: int = 5,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend=backend, device=device, dtype=dtype)
        if kernel_size % 2 == 0:
            raise ValueError(f"focused: kernel_size must be odd, got {kernel_size}")
        self.power = power
        self.scale = nn.Parameter(torch.empty(num_heads, self.head_dim, device=device, dtype=dtype))
        self.local = DepthwiseConv(dim, kernel_size, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scales of softplus(0)."""
        nn.init.zeros_(self.scale)

    def features(self, x: Tensor) -> Tensor:
        """f(x), [B, N, h, D]."""
        y = (x.relu() + 1e-6) / F.softplus(self.scale.to(x.dtype))
        return length(y) * unit(unit(y) ** self.power)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        q, k = self.features(q), self.features(k)
        local = local_values(self.local, v, grid)
        return attend(q, k, v, "features", grid, lepe=local, backend=self.backend)

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """The quadratic form; see `Mixer.definition`."""
        features = []
        for y in (q, k):
            y = (y.relu() + 1e-6) / F.softplus(self.scale)
            powers = y**self.power
            features.append(y.norm(dim=-1, keepdim=True) * F.normalize(powers, dim=-1, eps=1e-300))
        weights = torch.einsum("bnhd,bmhd->bhnm", *features)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6 * q.shape[1])
        out = torch.einsum("bhnm,bmhd->bnhd", weights, v)
        prefix, image = grid.split(v)
        return out + grid.join(prefix * 0, naive_convolution(self.local, image))


@register(
    AttentionDescription(
        name="efficientvit",
        formula="W [a; a'], a = f(q) S / (f(q) m), f = ReLU, a' of convolved q, k and v likewise",
        paper="arXiv:2205.14756",
        title="EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction",
        year=2022,
        cost="4 N D^2 + 3 N D (D + 25)",
        state="2 D (D + 1)",
        order="local",
        positive=False,
        rows_sum_to_one=False,
        query_magnitude=True,
        injective=False,
        backends=BACKENDS,
        options={"kernel_size": Option(5, "side of the convolution, odd", 3, 15)},
        origin="W ends inside of the mixer, [2 C, C], where the paper's has the output projection. "
        "The name `relu` is the attention of one scale.",
    )
)
class EfficientVit(Mixer):
    """ReLU attention on tokens, and on tokens that a convolution has gathered from around.

    The second scale has queries, keys and values of its own: a depthwise convolution of those of
    the first, then a matrix of each head. Tokens before the map go through the matrix alone.
    Source: arXiv:2205.14756, figure 2; the operator's 1e-6 is added to means of similarities.
    """

    row_rule = BANDED

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kernel_size: int = 5,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, backend=backend, device=device, dtype=dtype)
        if kernel_size % 2 == 0:
            raise ValueError(f"efficientvit: kernel_size must be odd, got {kernel_size}")
        self.gather = DepthwiseConv(3 * dim, kernel_size, device=device, dtype=dtype)
        self.gather.bias = None
        shape = (3 * num_heads, self.head_dim, self.head_dim)
        self.gather_heads = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.merge = Linear(2 * dim, dim, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Products that keep the size of what goes in."""
        init_normal_(self.gather_heads, std=self.head_dim**-0.5)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, extra: Tensor | None) -> Tensor:
        """The formula; see `Mixer.mix`."""
        wide = convolved_tokens(self.gather, torch.cat((q, k, v), dim=2), grid)
        wide = heads_matrix(wide, self.gather_heads)
        both = [(q, k, v), wide.chunk(3, dim=2)]
        outs = [attend(q, k, v, "relu", grid, backend=self.backend).flatten(2) for q, k, v in both]
        weight = self.merge.weight.to(q.dtype)
        return F.linear(torch.cat(outs, dim=-1), weight).reshape(v.shape)

    def definition(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor | None = None
    ) -> Tensor:
        """The quadratic form; see `Mixer.definition`."""
        prefix, image = grid.split(torch.cat((q, k, v), dim=2))
        wide = grid.join(prefix, naive_convolution(self.gather, image))
        wide = torch.einsum("bnhd,hde->bnhe", wide, self.gather_heads)
        outs = []
        for query, key, value in ((q, k, v), wide.chunk(3, dim=2)):
            weights = torch.einsum("bnhd,bmhd->bhnm", query.relu(), key.relu())
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-6 * q.shape[1])
            outs.append(torch.einsum("bhnm,bmhd->bnhd", weights, value).flatten(2))
        return (torch.cat(outs, dim=-1) @ self.merge.weight.T).reshape(v.shape)
