"""Blocks and stages on maps [B, C, H, W], made from those of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlinear.layers import ConvMlp
from vitlinear.layers.conv.depthwise_conv import ResidualDepthwiseConv
from vitlinear.models._pyramid import LinearPyramid, PyramidBlock
from vitlinear.models._stages import RotaryStage
from vitlinear.models.nalaformer import NaLaBlock
from vitlinear.ops import RotaryTables

from .attention import ChannelsFirstGatedAttention
from .layers import ChannelNorm, convolution, pointwise


class ChannelsFirstMlp(nn.Module):
    """`ConvMlp` on a map [B, C, H, W]."""

    def __init__(self, mlp: ConvMlp, norm: nn.LayerNorm) -> None:
        """Take the parameters over, those of the norm before it too."""
        super().__init__()
        first = mlp.fc1
        self.fc1 = pointwise(first.weight, first.bias, norm)
        self.act = nn.GELU()
        self.dwconv = convolution(mlp.dwconv)
        self.second_act = nn.GELU() if mlp.act2 is not None else nn.Identity()
        self.fc2 = pointwise(mlp.fc2.weight, mlp.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return self.fc2(self.second_act(self.dwconv(self.act(self.fc1(x)))))


class ChannelsFirstPyramidBlock(nn.Module):
    """`PyramidBlock` on a map [B, C, H, W]."""

    def __init__(self, block: PyramidBlock) -> None:
        """Take the parameters over."""
        super().__init__()
        self.pos = convolution(block.pos)
        self.norm1 = ChannelNorm(block.norm1.eps)
        self.attn = ChannelsFirstGatedAttention(block.attn, block.norm1)
        self.pos2 = convolution(block.pos2) if isinstance(block, NaLaBlock) else nn.Identity()
        self.norm2 = ChannelNorm(block.norm2.eps)
        self.mlp = ChannelsFirstMlp(block.mlp, block.norm2)

    def forward(self, x: Tensor, tables: RotaryTables) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        x = self.pos(x)
        x = self.pos2(x + self.attn(self.norm1(x), tables))
        return x + self.mlp(self.norm2(x))


class ChannelsFirstStage(nn.Module):
    """`RotaryStage` whose blocks take maps [B, C, H, W]."""

    def __init__(self, stage: RotaryStage) -> None:
        """Take the parameters over."""
        super().__init__()
        self.downsample = stage.downsample
        self.rotary = stage.rotary
        self.blocks = nn.ModuleList(map(ChannelsFirstPyramidBlock, stage.blocks))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C, H', W']."""
        x = self.downsample(x)
        tables = self.rotary(x)
        for block in self.blocks:
            x = block(x, tables)
        return x


@torch.no_grad()
def channels_first(model: LinearPyramid) -> LinearPyramid:
    """Put stages on maps [B, C, H, W] in the place of those of a fused pyramid."""
    model.stages = nn.Sequential(*map(ChannelsFirstStage, model.stages))
    return model
