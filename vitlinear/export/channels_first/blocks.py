"""Blocks and stages on maps [B, C, H, W], made from those of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.layers import LayerNorm
from torch import Tensor, nn

from vitlinear.layers import (
    GatedAttention,
    LinearAttention,
    MilaAttention,
    NormGatedAttention,
)
from vitlinear.models._pyramid import PyramidBlock
from vitlinear.models._stages import RotaryStage, Stage
from vitlinear.models.mila import MilaBlock
from vitlinear.models.nalaformer import NaLaBlock

from .attention import (
    ChannelsFirstGatedAttention,
    ChannelsFirstLinearAttention,
    ChannelsFirstMilaAttention,
)
from .layers import (
    ChannelNorm,
    ChannelsFirstMlp,
    NoForm,
    convolution,
    require,
    require_nothing,
)
from .positions import MapAngles

ATTENTIONS: dict[type[nn.Module], Callable[[Any, nn.LayerNorm], nn.Module]] = {
    GatedAttention: ChannelsFirstGatedAttention,
    NormGatedAttention: ChannelsFirstGatedAttention,
    LinearAttention: ChannelsFirstLinearAttention,
    MilaAttention: ChannelsFirstMilaAttention,
}


def attention_layer(attn: nn.Module, norm: nn.Module) -> nn.Module:
    """An attention on maps [B, C, H, W], after its norm; raises `NoForm`."""
    make = ATTENTIONS.get(type(attn))
    if make is None:
        raise NoForm(type(attn).__name__)
    require(attn, type(attn))
    require(norm, LayerNorm)
    assert isinstance(norm, nn.LayerNorm)
    return make(attn, norm)


class ChannelsFirstBlock(nn.Module):
    """Attention and feed-forward network with norms, residuals and convolutions between.

    Those that a block of the model has not are `nn.Identity`.
    """

    def __init__(self, block: nn.Module, pos1: str = "", pos2: str = "") -> None:
        """Take the parameters over.

        Args:
            block: With norm1, attn, drop_path1, norm2, mlp, drop_path2.
            pos1: Name of its convolution before the attention's norm; empty for none.
            pos2: Name of that after the attention's residual.
        """
        super().__init__()
        self.attn = attention_layer(block.attn, block.norm1)
        for name in ("drop_path1", "ls1", "drop_path2", "ls2"):
            require_nothing(getattr(block, name, nn.Identity()))
        self.pos1 = convolution(block.get_submodule(pos1)) if pos1 else nn.Identity()
        self.norm1 = ChannelNorm(block.norm1.eps)
        self.pos2 = convolution(block.get_submodule(pos2)) if pos2 else nn.Identity()
        require(block.norm2, LayerNorm)
        self.norm2 = ChannelNorm(block.norm2.eps)
        self.mlp = ChannelsFirstMlp(block.mlp, block.norm2)

    def forward(self, x: Tensor, *shared: Any) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        x = self.pos1(x)
        x = self.pos2(x + self.attn(self.norm1(x), *shared))
        return x + self.mlp(self.norm2(x))


BLOCKS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    PyramidBlock: lambda block: ChannelsFirstBlock(block, "pos"),
    NaLaBlock: lambda block: ChannelsFirstBlock(block, "pos", "pos2"),
    MilaBlock: lambda block: ChannelsFirstBlock(block, "pos1", "pos2"),
}


def block_of(block: nn.Module) -> nn.Module:
    """A block on maps [B, C, H, W]; raises `NoForm`."""
    make = BLOCKS.get(type(block))
    if make is None:
        raise NoForm(type(block).__name__)
    require(block, type(block))
    return make(block)


def num_heads(block: nn.Module) -> int:
    """Heads of the attention of a block."""
    attn = block.attn
    return (attn.attend if isinstance(attn, MilaAttention) else attn).num_heads


class ChannelsFirstStage(nn.Module):
    """`Stage` or `RotaryStage` whose blocks take maps [B, C, H, W]."""

    def __init__(self, stage: Stage) -> None:
        """Take the parameters over; raises `NoForm` if one of the blocks has none."""
        super().__init__()
        require(stage, Stage, RotaryStage)
        self.downsample = stage.downsample
        self.blocks = nn.ModuleList(map(block_of, stage.blocks))
        self.angles: MapAngles | None = None
        if isinstance(stage, RotaryStage) and stage.blocks:
            self.angles = MapAngles(stage.rotary, num_heads(stage.blocks[0]))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C, H', W']."""
        x = self.downsample(x)
        shared = () if self.angles is None else (self.angles(x),)
        for block in self.blocks:
            x = block(x, *shared)
        return x
