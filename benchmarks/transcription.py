"""RAVLT and MAViT as their definitions read, one PyTorch call for each step of a formula.

What a reader of RALA (arXiv:2411.07635) and MALA (arXiv:2507.00698) would write: maps [B, C, H, W]
throughout, 1x1 convolutions for projections, LayerNorm between two permutes, heads brought before
tokens by a copy, softmax stages with their matrix of weights, sines and cosines for each token.
Nothing is slow on purpose and nothing is clever. It is measured by `python
tools/benchmark_models.py ravlt_s@transcription`; the ratios of `benchmarks/accounts/` are to it.
Without stochastic depth and dropout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlinear.errors import UserError
from vitlinear.models._pyramid import LinearPyramid, PyramidBlock

SUFFIX = "@transcription"
TRANSCRIBED = ("ravlt_", "mavit_", "mila_", "h_vittt_", "pola_pvt_")  # beginnings of names


def rotation(height: int, width: int, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Sines and cosines of each token's angles, [H W, D] each; g = D/4 frequencies an axis."""
    omega = 1 / 10000 ** torch.linspace(0, 1, dim // 4, device=like.device)
    omega = omega.to(like.dtype).repeat_interleave(2)
    rows = torch.arange(height, device=like.device).to(like.dtype)[:, None] * omega
    cols = torch.arange(width, device=like.device).to(like.dtype)[:, None] * omega
    rows = rows[:, None, :].expand(height, width, -1)
    cols = cols[None, :, :].expand(height, width, -1)
    angles = torch.cat((rows, cols), dim=-1).flatten(0, 1)
    return angles.sin(), angles.cos()


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """(x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin), x [..., N, D]."""
    swapped = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    return x * cos + swapped * sin


def rala(q: Tensor, k: Tensor, v: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rank-augmented linear attention, [B, h, N, D] in and out."""
    n, scale = q.shape[2], q.shape[3] ** -0.5
    q, k = F.elu(q) + 1, F.elu(k) + 1
    query = q.mean(dim=2, keepdim=True)
    weights = torch.softmax((scale * query) @ k.transpose(-1, -2), dim=-1).transpose(-1, -2) * n
    k = k * weights
    normaliser = 1 / (q @ k.mean(dim=2, keepdim=True).transpose(-1, -2) + 1e-6)
    q, k = rotate(q, sin, cos), rotate(k, sin, cos)
    state = (k.transpose(-1, -2) * n**-0.5) @ (v * n**-0.5)
    return q @ state * normaliser


def mala(q: Tensor, k: Tensor, v: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Magnitude-aware linear attention, [B, h, N, D] in and out."""
    n, scale = q.shape[2], q.shape[3] ** -0.5
    q, k = F.elu(q) + 1, F.elu(k) + 1
    z = q @ k.mean(dim=2, keepdim=True).transpose(-1, -2) * scale
    q, k = rotate(q, sin, cos), rotate(k, sin, cos)
    state = (k.transpose(-1, -2) * (scale / n) ** 0.5) @ (v * (scale / n) ** 0.5)
    return q @ state * (1 + 1 / (z + 1e-6)) - z * v.mean(dim=2, keepdim=True)


def softmax(q: Tensor, k: Tensor, v: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Softmax attention with its N x N matrix, [B, h, N, D] in and out."""
    q, k = rotate(q, sin, cos), rotate(k, sin, cos)
    weights = torch.softmax(q * q.shape[3] ** -0.5 @ k.transpose(-1, -2), dim=-1)
    return weights @ v


ATTENTIONS = {"rala": rala, "mala": mala, "softmax": softmax}


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        x = x.permute(0, 2, 3, 1).contiguous()
        return super().forward(x).permute(0, 3, 1, 2).contiguous()


class Scale(nn.Module):
    """gamma of each channel times a map [B, C, H, W]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return self.gamma * x


class ConvBn(nn.Module):
    """Convolution and batch norm."""

    def __init__(
        self, in_chans: int, out_chans: int, kernel: int, stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel, stride, kernel // 2, bias=bias)
        self.bn = nn.BatchNorm2d(out_chans)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H', W']."""
        return self.bn(self.conv(x))


class Attention(nn.Module):
    """proj((Attention(q, k, v) + dw5(v)) * o)."""

    def __init__(self, dim: int, num_heads: int, attn_type: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention = ATTENTIONS[attn_type]
        self.qkvo = nn.Conv2d(dim, 4 * dim, 1)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        B, C, H, W = x.shape
        q, k, v, o = self.qkvo(x).chunk(4, dim=1)
        lepe = self.lepe(v)
        q, k, v = (
            t.reshape(B, self.num_heads, C // self.num_heads, H * W)
            .permute(0, 1, 3, 2)
            .contiguous()
            for t in (q, k, v)
        )
        out = self.attention(q, k, v, sin, cos).permute(0, 1, 3, 2).reshape(B, C, H, W)
        return self.proj((out + lepe) * o)


class Mlp(nn.Module):
    """fc2(y + dw3(y)), y = GELU(fc1(x))."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        x = F.gelu(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


class Block(nn.Module):
    """Positional convolution, attention and feed-forward network, each with its residual."""

    def __init__(self, dim: int, num_heads: int, hidden: int, attn_type: str) -> None:
        super().__init__()
        self.pos = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = ChannelNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, attn_type)
        self.ls1 = Scale(dim)
        self.norm2 = ChannelNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)
        self.ls2 = Scale(dim)

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        x = x + self.pos(x)
        x = x + self.ls1(self.attn(self.norm1(x), sin, cos))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """A strided convolution but in the first stage, then blocks."""

    def __init__(self, downsample: nn.Module, blocks: list[Block], head_dim: int) -> None:
        super().__init__()
        self.downsample, self.head_dim = downsample, head_dim
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C, H', W']."""
        x = self.downsample(x)
        sin, cos = rotation(x.shape[2], x.shape[3], self.head_dim, x)
        for block in self.blocks:
            x = block(x, sin, cos)
        return x


class Transcription(nn.Module):
    """A pyramid of RALA or MALA, with the sizes and the names of one of ours."""

    def __init__(self, model: LinearPyramid) -> None:
        super().__init__()
        dims = [info["num_chs"] for info in model.feature_info]
        half = dims[0] // 2
        self.stem = nn.ModuleDict(
            {
                "conv1": ConvBn(model.in_chans, half, 3, 2),
                "conv2": ConvBn(half, half, 3),
                "conv3": ConvBn(half, half, 3),
                "conv4": ConvBn(half, dims[0], 3, 2),
            }
        )
        stages = []
        for i, stage in enumerate(model.stages):
            blocks = [
                Block(dims[i], b.attn.num_heads, b.mlp.fc1.out_features, b.attn.attn_type)
                for b in stage.blocks
            ]
            downsample = ConvBn(dims[i - 1], dims[i], 3, 2) if i else nn.Identity()
            stages.append(Stage(downsample, blocks, stage.rotary.head_dim))
        self.stages = nn.Sequential(*stages)
        self.final = ConvBn(dims[-1], model.num_features, 1)
        self.head = nn.ModuleDict({"fc": nn.Conv2d(model.num_features, model.num_classes, 1)})

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> logits [B, num_classes]."""
        for name in ("conv1", "conv2", "conv3"):
            x = F.gelu(self.stem[name](x))
        x = self.stages(self.stem["conv4"](x))
        x = F.silu(self.final(x))
        x = x.mean(dim=(2, 3), keepdim=True)
        return self.head["fc"](x).flatten(1)


def check_transcribed(name: str) -> str:
    """Returns the name of the model of ours that ``name``, with `SUFFIX`, is a transcription of.

    Raises:
        UserError: There is none of it.
    """
    base = name.removesuffix(SUFFIX)
    if not f"{base.removeprefix('test_')}_".startswith(TRANSCRIBED):
        names = ", ".join(f"{prefix}*" for prefix in TRANSCRIBED)
        raise UserError(f"{name}: only {names} are transcribed, e.g. ravlt_s{SUFFIX}")
    return base


def _transcription(model: nn.Module) -> nn.Module:
    """The transcription of a model, with weights of its own."""
    # Made of parts of this file.
    from .transcription_mila import MILA, MilaTranscription
    from .transcription_pola import PolaPVT, PolaPVTTranscription
    from .transcription_vittt import HViTTT, HViTTTTranscription

    if isinstance(model, MILA):
        return MilaTranscription(model)
    if isinstance(model, PolaPVT):
        return PolaPVTTranscription(model)
    if isinstance(model, HViTTT):
        return HViTTTTranscription(model)
    blocks = [block for stage in getattr(model, "stages", ()) for block in stage.blocks]
    if not isinstance(model, LinearPyramid) or not all(
        type(block) is PyramidBlock and block.attn.attn_type in ATTENTIONS for block in blocks
    ):
        raise TypeError(f"no transcription of {type(model).__name__}")
    return Transcription(model)


def transcribe(model: nn.Module) -> nn.Module:
    """The transcription of a model of ours, with its weights and statistics, in its mode.

    Raises:
        TypeError: There is none of this model.
    """
    like = next(model.parameters())
    made = _transcription(model).to(like.device, like.dtype).train(model.training)
    # Ours are linear layers where the definition has 1x1 convolutions.
    shapes = {name: value.shape for name, value in made.state_dict().items()}
    state = {name: value.reshape(shapes[name]) for name, value in model.state_dict().items()}
    made.load_state_dict(state)
    return made
