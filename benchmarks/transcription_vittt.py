"""H-ViT³ as its definition reads, one PyTorch call for each step of a formula.

As `benchmarks/transcription.py`, for the hierarchical models of ViT³ (arXiv:2512.01643): maps
[B, C, H, W] throughout, 1x1 convolutions for projections, the step of training written out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear.models.vittt import HViTTT

from .transcription import ChannelNorm, ConvBn, rotate
from .transcription_mila import Downsample, Stage


def stepped(weight: Tensor, state: Tensor, axes: tuple[int, ...]) -> Tensor:
    """w + u / (|u| + 1) with u = S / 3, the norm taken over these axes."""
    step = state / 3
    return weight + step / (torch.linalg.vector_norm(step, dim=axes, keepdim=True) + 1)


class Attention(nn.Module):
    """proj([f(q1); g(q2)]), f a gated unit for each head, g a depthwise convolution."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.w1 = nn.Parameter(torch.empty(num_heads, self.head_dim, self.head_dim))
        self.w2 = nn.Parameter(torch.empty(num_heads, self.head_dim, self.head_dim))
        self.w3 = nn.Parameter(torch.empty(self.head_dim, 3, 3))
        self.qkv = nn.Conv2d(dim, 3 * (dim + self.head_dim), 1)
        self.proj = nn.Conv2d(dim + self.head_dim, dim, 1)

    def heads(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, h, N, D]."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def gated_unit(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(W1^T q) silu(W2^T q) after a step on keys and values, [B, h, N, D]."""
        n = q.shape[2]
        a, b = k @ self.w1, k @ self.w2
        sigmoid = torch.sigmoid(b)
        slope = sigmoid * (1 + b * (1 - sigmoid))
        state1 = k.transpose(-1, -2) @ (v * F.silu(b)) / n
        state2 = k.transpose(-1, -2) @ (v * a * slope) / n
        w1, w2 = stepped(self.w1, state1, (-2,)), stepped(self.w2, state2, (-2,))
        return (q @ w1) * F.silu(q @ w2)

    def convolution(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """dw3(q) after a step on keys and values, [B, D, H, W]."""
        B, D, H, W = q.shape
        taps = F.unfold(k, 3, padding=1).view(B, D, 9, H * W)
        state = (taps * v.flatten(2).unsqueeze(2)).sum(3).view(B, D, 3, 3) / (H * W)
        weight = stepped(self.w3, state, (-2, -1))
        q = F.conv2d(
            q.reshape(1, B * D, H, W), weight.reshape(B * D, 1, 3, 3), None, 1, 1, 1, B * D
        )
        return q.view(B, D, H, W)

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        sizes = [x.shape[1]] * 3 + [self.head_dim] * 3
        q1, k1, v1, q2, k2, v2 = self.qkv(x).split(sizes, dim=1)
        q1, k1, v1 = (t.flatten(2).transpose(1, 2) for t in (q1, k1, v1))
        q1, k1 = rotate(q1, sin, cos), rotate(k1, sin, cos)
        f = self.gated_unit(*map(self.heads, (q1, k1, v1)))
        f = f.transpose(1, 2).flatten(2).transpose(1, 2).reshape(x.shape)
        return self.proj(torch.cat((f, self.convolution(q2, k2, v2)), dim=1))


class Mlp(nn.Module):
    """fc2(GELU(y + dw3(y))), y = GELU(fc1(x))."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        y = F.gelu(self.fc1(x))
        return self.fc2(F.gelu(y + self.dwconv(y)))


class Block(nn.Module):
    """Positional convolution, attention and feed-forward network."""

    def __init__(self, dim: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.pos = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = ChannelNorm(dim, eps=1e-5)
        self.attn = Attention(dim, num_heads)
        self.norm2 = ChannelNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        x = x + self.pos(x)
        x = x + self.attn(self.norm1(x), sin, cos)
        return x + self.mlp(self.norm2(x))


class HViTTTTranscription(nn.Module):
    """An H-ViT³ with the sizes and the names of one of ours."""

    def __init__(self, model: HViTTT) -> None:
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
                Block(dims[i], b.attn.num_heads, b.mlp.fc1.out_features) for b in stage.blocks
            ]
            stages.append(Stage(Downsample(dims[i - 1], dims[i]) if i else nn.Identity(), blocks))
        self.stages = nn.Sequential(*stages)
        self.final = nn.BatchNorm2d(dims[-1])
        self.head = nn.ModuleDict({"fc": nn.Conv2d(dims[-1], model.num_classes, 1)})

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> logits [B, num_classes]."""
        for name in ("conv1", "conv2", "conv3", "conv4"):
            x = F.relu(self.stem[name](x))
        x = self.final(self.stages(self.stem["conv5"](x)))
        return self.head["fc"](x.mean(dim=(2, 3), keepdim=True)).flatten(1)
