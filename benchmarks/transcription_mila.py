"""MILA as its definition reads, one PyTorch call for each step of a formula.

As `benchmarks/transcription.py`, for MILA (MLLA, arXiv:2405.16605): maps [B, C, H, W] throughout,
1x1 convolutions for projections, a rotary table for each token that turns its whole width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear.models.mila import MILA

from .transcription import ChannelNorm, ConvBn, rotate


def rotation(height: int, width: int, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Sines and cosines of each token's angles, [H W, C] each; C/4 frequencies an axis.

    Made in float32, as the authors' tables are.
    """
    steps = torch.arange(dim // 4, device=like.device, dtype=torch.float32) / (dim // 4)
    omega = (1 / 10000**steps).repeat_interleave(2)
    rows = torch.arange(height, device=like.device, dtype=torch.float32)[:, None] * omega
    cols = torch.arange(width, device=like.device, dtype=torch.float32)[:, None] * omega
    rows = rows[:, None, :].expand(height, width, -1)
    cols = cols[None, :, :].expand(height, width, -1)
    angles = torch.cat((rows, cols), dim=-1).flatten(0, 1)
    return angles.sin().to(like.dtype), angles.cos().to(like.dtype)


class Attend(nn.Module):
    """Attention(q, k, u) + dw3(u), q and k projections of u."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qk = nn.Conv2d(dim, 2 * dim, 1)
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def heads(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, h, N, D]."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, u: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        n = u.shape[2] * u.shape[3]
        q, k = self.qk(u).flatten(2).transpose(1, 2).chunk(2, dim=2)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        turned_q, turned_k = rotate(q, sin, cos), rotate(k, sin, cos)
        q, k, turned_q, turned_k = map(self.heads, (q, k, turned_q, turned_k))
        v = self.heads(u.flatten(2).transpose(1, 2))
        normaliser = 1 / (q @ k.mean(dim=2, keepdim=True).transpose(-1, -2) + 1e-6)
        state = (turned_k.transpose(-1, -2) * n**-0.5) @ (v * n**-0.5)
        out = turned_q @ state * normaliser
        return out.transpose(1, 2).flatten(2).transpose(1, 2).reshape(u.shape) + self.lepe(u)


class Attention(nn.Module):
    """proj(attend(SiLU(dw3(in_proj(x)))) * SiLU(gate_proj(x)))."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.in_proj = nn.Conv2d(dim, dim, 1)
        self.gate_proj = nn.Conv2d(dim, dim, 1)
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.attend = Attend(dim, num_heads)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        u = F.silu(self.dwconv(self.in_proj(x)))
        return self.proj(self.attend(u, sin, cos) * F.silu(self.gate_proj(x)))


class Block(nn.Module):
    """Attention and feed-forward network, each after a positional convolution and a norm."""

    def __init__(self, dim: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.pos1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = ChannelNorm(dim, eps=1e-5)
        self.attn = Attention(dim, num_heads)
        self.pos2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm2 = ChannelNorm(dim, eps=1e-5)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Conv2d(dim, hidden, 1), "fc2": nn.Conv2d(hidden, dim, 1)}
        )

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        x = x + self.pos1(x)
        x = x + self.attn(self.norm1(x), sin, cos)
        x = x + self.pos2(x)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Downsample(nn.Module):
    """conv1, ReLU, depthwise conv3 of stride 2, ReLU, conv1, batch norm."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, 4 * dim, 1)
        self.conv2 = nn.Conv2d(4 * dim, 4 * dim, 3, 2, 1, groups=4 * dim)
        self.conv3 = ConvBn(4 * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C, ceil(H/2), ceil(W/2)]."""
        return self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))


class Stage(nn.Module):
    """Downsampling but in the first stage, then blocks."""

    def __init__(self, downsample: nn.Module, blocks: list[Block]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C, H', W']."""
        x = self.downsample(x)
        sin, cos = rotation(x.shape[2], x.shape[3], x.shape[1], x)
        for block in self.blocks:
            x = block(x, sin, cos)
        return x


class MilaTranscription(nn.Module):
    """A MILA with the sizes and the names of one of ours."""

    def __init__(self, model: MILA) -> None:
        super().__init__()
        dims = [info["num_chs"] for info in model.feature_info]
        half, wide = dims[0] // 2, 4 * dims[0]
        self.stem = nn.ModuleDict(
            {
                "conv1": ConvBn(model.in_chans, half, 3, 2, bias=False),
                "conv2": ConvBn(half, half, 3, bias=False),
                "conv3": ConvBn(half, half, 3, bias=False),
                "conv4": ConvBn(half, wide, 3, 2, bias=False),
                "conv5": ConvBn(wide, dims[0], 1, bias=False),
            }
        )
        stages = []
        for i, stage in enumerate(model.stages):
            blocks = [
                Block(dims[i], b.attn.attend.num_heads, b.mlp.fc1.out_features)
                for b in stage.blocks
            ]
            stages.append(Stage(Downsample(dims[i - 1], dims[i]) if i else nn.Identity(), blocks))
        self.stages = nn.Sequential(*stages)
        self.final = ChannelNorm(dims[-1], eps=1e-5)
        self.head = nn.ModuleDict({"fc": nn.Conv2d(dims[-1], model.num_classes, 1)})

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> logits [B, num_classes]."""
        stem = self.stem
        x = F.relu(stem["conv1"](x))
        x = x + stem["conv3"](F.relu(stem["conv2"](x)))
        x = stem["conv5"](F.relu(stem["conv4"](x)))
        x = self.final(self.stages(x)).mean(dim=(2, 3), keepdim=True)
        return self.head["fc"](x).flatten(1)
