"""InLine attention on maps [B, C, H, W]: one window, with a local term whose kernel is computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear.layers import DynamicConv, InjectiveAttention, InLineAttention
from vitlinear.layers.conv.dynamic_conv import TokenConv
from vitlinear.layers.windows import equal_windows

from .attention import Slots, heads_of
from .formula import attention
from .layers import MapSize, NoForm, linear, require, require_nothing


class ChannelsFirstDynamicConv(nn.Module):
    """`DynamicConv` on a map [B, C, H, W]."""

    def __init__(self, conv: nn.Module, norm: nn.LayerNorm, batch: int | None) -> None:
        """Take the parameters over.

        Args:
            conv: The convolution.
            norm: The norm of the tokens whose mean its kernels come from, which becomes part of it.
            batch: Of all inputs; None where it varies. With one, all samples are one convolution.
        """
        super().__init__()
        require(conv, DynamicConv)
        assert isinstance(conv, DynamicConv)
        for part in (conv.fc1, conv.fc2):
            require(part, TokenConv)
        require(conv.act, nn.GELU)
        self.batch = batch
        groups = conv.fc1.groups
        weight = conv.fc1.weight.detach()[:, :, 0].unflatten(0, (groups, -1)).double()
        scale = norm.weight.detach().double().unflatten(0, (groups, 1, -1))
        shift = norm.bias.detach().double().unflatten(0, (groups, -1, 1))
        bias = conv.fc1.bias.detach().double() + (weight @ shift).flatten()
        self.weight1 = nn.Parameter((weight * scale).mT.to(norm.weight.dtype).contiguous())
        self.bias1 = nn.Parameter(bias.to(norm.weight.dtype))
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
        taps = self.kernels(mean)
        _, channels, height, width = x.shape
        if self.batch is not None:
            count = self.batch * channels
            maps, kernel = x.reshape(1, count, height, width), taps.reshape(count, 1, 3, 3)
            return F.conv2d(maps, kernel, padding=1, groups=count).reshape(x.shape)
        x = F.pad(x, (1, 1, 1, 1))
        columns = [x[..., i : i + width] for i in range(3)]
        rows = []
        for i in range(3):
            row = columns[0] * taps[:, :, 3 * i, None, None]
            for j in (1, 2):
                row = row + columns[j] * taps[:, :, 3 * i + j, None, None]
            rows.append(row[:, :, i : i + height])
        return rows[0] + rows[1] + rows[2]


class ChannelsFirstInLineAttention(nn.Module):
    """`InLineAttention` on a map [B, C, H, W] that is one window."""

    def __init__(self, attn: nn.Module, norm: nn.LayerNorm, size: MapSize | None) -> None:
        """Take the parameters over.

        Args:
            attn: The layer.
            norm: The norm before it, which becomes part of it.
            size: Of the map; None where it varies.

        Raises:
            NoForm: There are several windows, or it depends on the size.
        """
        super().__init__()
        require(attn, InLineAttention)
        assert isinstance(attn, InLineAttention)
        require(attn.attend, InjectiveAttention)
        require_nothing(attn.proj_drop)
        if attn.window_size > 0 and (
            size is None
            or any(equal_windows(n, attn.window_size)[0] > 1 for n in (size.height, size.width))
        ):
            raise NoForm("InLineAttention in windows")
        self.num_heads = attn.attend.num_heads
        slots = Slots(attn.qkv, 3, self.num_heads, norm)
        self.q, self.k, self.v = (slots.rows(i) for i in range(3))
        batch = None if size is None else size.batch
        self.local = ChannelsFirstDynamicConv(attn.attend.local, norm, batch)
        self.proj = linear(attn.proj)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; x without what its norm multiplies and adds."""
        values = self.v(x)
        q, k, v = (heads_of(y, self.num_heads) for y in (self.q(x), self.k(x), values))
        local = self.local(values, torch.mean(x, (2, 3), keepdim=True))
        out = attention((q,), (k,), v, "inline")
        return self.proj(out.reshape(x.shape) + local)
