"""Pola-PVT as its definition reads, one PyTorch call for each step of a formula.

As `benchmarks/transcription.py`, for PolaFormer in the layout of PVT (arXiv:2501.15061): tokens
[B, N, C] in blocks, as the layout has them, powers and both halves of the values written out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear.models.pola_pvt import PolaPVT


def positions(table: Tensor, height: int, width: int, mode: str) -> Tensor:
    """Learned positions of a square map, [1, N, C], resized to another map."""
    side = round(table.shape[1] ** 0.5)
    if (height, width) == (side, side):
        return table
    square = table.transpose(1, 2).unflatten(2, (side, side))
    resized = F.interpolate(square, (height, width), mode=mode, align_corners=False)
    return resized.flatten(2).transpose(1, 2)


class Attend(nn.Module):
    """Products of equal and of unequal signs, plus dw5 of the values, whose kernels heads share."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.power = nn.Parameter(torch.empty(1, num_heads, 1, self.head_dim))
        self.lepe = nn.Conv2d(self.head_dim, self.head_dim, 5, padding=2, groups=self.head_dim)

    def heads(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, h, N, D]."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        """[B, N, C] each -> [B, N, C]."""
        q, k, v = map(self.heads, (q, k, v))
        power = 1 + 4 * torch.sigmoid(self.power)
        positive_q, negative_q = F.relu(q) ** power, F.relu(-q) ** power
        keys = torch.cat((F.relu(k) ** power, F.relu(-k) ** power), dim=3)
        same = torch.cat((positive_q, negative_q), dim=3)
        opposite = torch.cat((negative_q, positive_q), dim=3)
        mean = keys.mean(dim=2, keepdim=True).transpose(-1, -2)
        n, outs = q.shape[2], []
        for queries, values in zip((same, opposite), v.chunk(2, dim=3), strict=True):
            state = (keys.transpose(-1, -2) * n**-0.5) @ (values * n**-0.5)
            outs.append(queries @ state / (queries @ mean + 1e-6))
        out = torch.cat(outs, dim=3).transpose(1, 2).flatten(2)
        maps = v.transpose(2, 3).reshape(-1, self.head_dim, height, width)
        lepe = self.lepe(maps).view(q.shape[0], -1, n).transpose(1, 2)
        return out + lepe


class Attention(nn.Module):
    """proj(attend(q / s, (k + E) / s, v) * g)."""

    def __init__(self, dim: int, num_heads: int, tokens: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(1, 1, dim))
        self.positional_encoding = nn.Parameter(torch.empty(1, tokens, dim))
        self.qkvg = nn.Linear(dim, 4 * dim)
        self.attend = Attend(dim, num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        q, k, v, gate = self.qkvg(x).chunk(4, dim=2)
        scale = F.softplus(self.scale)
        k = k + positions(self.positional_encoding, height, width, "bicubic")
        return self.proj(self.attend(q / scale, k / scale, v, height, width) * gate)


class Block(nn.Module):
    """Attention and feed-forward network."""

    def __init__(self, dim: int, num_heads: int, tokens: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, tokens)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        x = x + self.attn(self.norm1(x), height, width)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Patches(nn.Module):
    """Convolution without overlap, norm, learned positions."""

    def __init__(self, in_chans: int, dim: int, side: int, tokens: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, dim))
        self.conv = nn.Conv2d(in_chans, dim, side, side)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        """[B, C_in, H, W] -> [B, N, C], and the map that the tokens are of."""
        x = self.conv(x)
        height, width = x.shape[2:]
        x = self.norm(x.flatten(2).transpose(1, 2))
        return x + positions(self.pos_embed, height, width, "bilinear"), height, width


class Stage(nn.Module):
    """Patches but in the first stage, whose patches are the stem, then blocks."""

    def __init__(self, downsample: nn.Module, blocks: list[Block]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)


class PolaPVTTranscription(nn.Module):
    """A Pola-PVT with the sizes and the names of one of ours."""

    def __init__(self, model: PolaPVT) -> None:
        super().__init__()
        dims = [info["num_chs"] for info in model.feature_info]
        tokens = [stage.blocks[0].attn.positional_encoding.shape[1] for stage in model.stages]
        self.stem = Patches(model.in_chans, dims[0], 4, tokens[0])
        stages = []
        for i, stage in enumerate(model.stages):
            blocks = [
                Block(dims[i], b.attn.attend.num_heads, tokens[i], b.mlp.fc1.out_features)
                for b in stage.blocks
            ]
            patches = Patches(dims[i - 1], dims[i], 2, tokens[i]) if i else nn.Identity()
            stages.append(Stage(patches, blocks))
        self.stages = nn.ModuleList(stages)
        self.final = nn.LayerNorm(dims[-1])  # which is never applied
        self.head = nn.ModuleDict({"fc": nn.Conv2d(dims[-1], model.num_classes, 1)})

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> logits [B, num_classes]."""
        for i, stage in enumerate(self.stages):
            x, height, width = stage.downsample(x) if i else self.stem(x)
            for block in stage.blocks:
                x = block(x, height, width)
            x = x.transpose(1, 2).unflatten(2, (height, width))
        return self.head["fc"](x.mean(dim=(2, 3), keepdim=True)).flatten(1)
