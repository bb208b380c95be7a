"""InLine attention on maps [B, C, H, W], with a local term whose kernel is computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear.layers import DynamicConv, InjectiveAttention, InLineAttention
from vitlinear.layers.attention.inline_attention import InLineTokenAttention
from vitlinear.layers.conv.dynamic_conv import TokenConv
from vitlinear.layers.windows import equal_windows
from vitlinear.ops.mechanisms import MECHANISMS

from .attention import Slots, heads_of
from .conv import conv_per_sample
from .formula import linear_attention
from .layers import MapSize, NoForm, linear, require, require_gelu, require_nothing
from .windows import Windows


class ChannelsFirstDynamicConv(nn.Module):
    """`DynamicConv` on a map [B, C, H, W]."""

    def __init__(self, conv: nn.Module, norm: nn.LayerNorm | None, batch: int | None) -> None:
        """Take the parameters over.

        Args:
            conv: The convolution.
            norm: The norm of the tokens whose mean its kernels come from, which becomes part of it;
                None where the mean is of what has no norm.
            batch: Of all inputs; None where it varies. With one, all samples are one convolution.
        """
        super().__init__()
        require(conv, DynamicConv)
        assert isinstance(conv, DynamicConv)
        for part in (conv.fc1, conv.fc2):
            require(part, TokenConv)
            if part.bias is None:
                raise NoForm("TokenConv without bias")
        require_gelu(conv.act)
        self.batch = batch
        groups, dtype = conv.fc1.groups, conv.fc1.weight.dtype
        weight = conv.fc1.weight.detach()[:, :, 0].unflatten(0, (groups, -1)).double()
        bias = conv.fc1.bias.detach().double()
        if norm is not None:
            shift = norm.bias.detach().double().unflatten(0, (groups, -1, 1))
            bias = bias + (weight @ shift).flatten()
            weight = weight * norm.weight.detach().double().unflatten(0, (groups, 1, -1))
        self.weight1 = nn.Parameter(weight.mT.to(dtype).contiguous())
        self.bias1 = nn.Parameter(bias.to(dtype))
        weight = conv.fc2.weight.detach()[:, :, 0].unflatten(0, (groups, -1))
        self.weight2 = nn.Parameter(weight.mT.contiguous())
        self.bias2 = nn.Parameter(conv.fc2.bias.detach().clone())

    def kernels(self, mean: Tensor) -> Tensor:
        """Mean tokens without what the norm multiplies and adds, [B, C, 1, 1] -> [B, C, 9]."""
        groups = self.weight1.shape[0]
        x = (mean.reshape(-1, groups, 1, self.weight1.shape[1]) @ self.weight1).flatten(1)
        x = F.gelu(x + self.bias1)
        x = (x.reshape(-1, groups, 1, self.weight2.shape[1]) @ self.weight2).flatten(1)
        return (x + self.bias2).unflatten(1, (-1, 9))

    def forward(self, x: Tensor, mean: Tensor) -> Tensor:
        """[B, C, H, W], and mean tokens as `kernels` takes them -> [B, C, H, W]."""
        return conv_per_sample(x, self.kernels(mean), self.batch)


class ChannelsFirstInjectiveAttention(nn.Module):
    """Products with q, k and v, and `InjectiveAttention` of them, on a map [B, C, H, W]."""

    def __init__(
        self, slots: Slots, attend: nn.Module, norm: nn.LayerNorm | None, batch: int | None
    ) -> None:
        """Take the parameters over.

        Args:
            slots: What gives q, k and v.
            attend: The attention.
            norm: Of what the mean is taken of; see `ChannelsFirstDynamicConv`.
            batch: Of all maps, windows too; None where it varies.
        """
        super().__init__()
        require(attend, InjectiveAttention)
        assert isinstance(attend, InjectiveAttention)
        self.num_heads, self.prefix = attend.num_heads, attend.num_prefix_tokens
        self.q, self.k, self.v = (slots.rows(i) for i in range(3))
        self.local = ChannelsFirstDynamicConv(attend.local, norm, batch)

    def forward(
        self,
        x: Tensor,
        mean: Tensor,
        grid: tuple[int, int] | None = None,
        windows: Windows | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            x: [B, C, H, W], or tokens [B, C, 1, N].
            mean: Of the tokens that the kernels come from, [B, C, 1, 1].
            grid: Rows and columns of the map whose tokens are the last ones of x; None for those
                of x.
            windows: Those that x is of; None where it is of whole maps.

        Returns:
            What comes out, and the values, [B, C', H, W] each.
        """
        keys, values, tokens = self.k(x), self.v(x), None
        if windows is not None:
            keys, values = windows.without_padding(keys), windows.without_padding(values)
            tokens = windows.tokens_of(x)
        q, k, v = (heads_of(y, self.num_heads) for y in (self.q(x), keys, values))
        out = linear_attention((q,), (k,), v, MECHANISMS["inline"], None, tokens=tokens).reshape(
            values.shape
        )
        if grid is None:
            return out + self.local(values, mean), values
        count, channels = values.shape[:2]
        tokens = values[..., self.prefix :].reshape(count, channels, *grid)
        local = self.local(tokens, mean).reshape(count, channels, 1, grid[0] * grid[1])
        return out + F.pad(local, (self.prefix, 0)), values


class ChannelsFirstInLineAttention(nn.Module):
    """`InLineAttention` on a map [B, C, H, W]."""

    def __init__(self, attn: nn.Module, norm: nn.LayerNorm, size: MapSize | None) -> None:
        """Take the parameters over.

        Args:
            attn: The layer.
            norm: The norm before it, which becomes part of it.
            size: Of the map; None where it varies.

        Raises:
            NoForm: There are windows that depend on the size of the map.
        """
        super().__init__()
        require(attn, InLineAttention)
        assert isinstance(attn, InLineAttention)
        require_nothing(attn.proj_drop)
        self.windows: Windows | None = None
        products_norm: nn.Module | None = norm
        batch = None if size is None else size.batch
        if attn.window_size > 0:
            if size is None:
                raise NoForm("InLineAttention in windows at any size")
            sides = (equal_windows(n, attn.window_size) for n in (size.height, size.width))
            self.windows = Windows(size, *sides, norm)
            products_norm = self.windows.norm_of_products(norm)
            batch = self.windows.batch
        slots = Slots(attn.qkv, 3, attn.attend.num_heads, products_norm)
        self.attend = ChannelsFirstInjectiveAttention(slots, attn.attend, products_norm, batch)
        self.proj = linear(attn.proj)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; x without what its norm multiplies and adds."""
        if self.windows is None:
            return self.proj(self.attend(x, x.mean((2, 3), keepdim=True))[0])
        x = self.windows.of_map(x)
        out, _ = self.attend(x, self.windows.mean(x), windows=self.windows)
        return self.windows.to_map(self.proj(out))


class ChannelsFirstInLineTokenAttention(nn.Module):
    """`InLineTokenAttention` on tokens [B, C, 1, N]."""

    def __init__(self, attn: nn.Module, norm: nn.LayerNorm, size: MapSize | None) -> None:
        """Take the parameters over; arguments as `ChannelsFirstInLineAttention`."""
        super().__init__()
        require(attn, InLineTokenAttention)
        assert isinstance(attn, InLineTokenAttention)
        require_nothing(attn.proj_drop)
        slots = Slots(attn.qkv, 3, attn.attend.num_heads, norm)
        batch = None if size is None else size.batch
        self.attend = ChannelsFirstInjectiveAttention(slots, attn.attend, norm, batch)
        self.proj = linear(attn.proj)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """[B, C, 1, N] -> [B, C, 1, N]; x without what its norm multiplies and adds."""
        mean = torch.mean(x, (2, 3), keepdim=True)
        return self.proj(self.attend(x, mean, (height, width))[0])
