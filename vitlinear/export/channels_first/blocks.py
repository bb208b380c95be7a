"""Blocks, stages and rows of tokens on maps [B, C, H, W], made from those of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vitlinear.layers import (
    ConvMlp,
    GatedAttention,
    InLineAttention,
    LightNetAttention,
    LinearAttention,
    MapRotaryTables,
    MilaAttention,
    Mlp,
    NormGatedAttention,
    PaddedWindowAttention,
    SwiGlu,
)
from vitlinear.layers.attention.cross_shaped_attention import CrossShapedAttention
from vitlinear.layers.attention.inline_attention import InLineTokenAttention
from vitlinear.layers.attention.pola_attention import PolaAttention
from vitlinear.layers.attention.shifted_window_attention import ShiftedWindowAttention
from vitlinear.layers.attention.ttt_attention import TttAttention
from vitlinear.layers.layout import known_strides, split_axis
from vitlinear.models._hosts import HostBlock, MapMerging
from vitlinear.models._isotropic import TokenBlock
from vitlinear.models._pyramid import PyramidBlock
from vitlinear.models._stages import RotaryStage, Stage
from vitlinear.models.inline_cswin import CrossShapedBlock
from vitlinear.models.l2vit import L2LinearBlock, L2WindowBlock
from vitlinear.models.mila import MilaBlock
from vitlinear.models.nalaformer import NaLaBlock
from vitlinear.models.vittt import HViTTTBlock, PositionedTokenBlock

from .attention import (
    ChannelsFirstGatedAttention,
    ChannelsFirstLightNetAttention,
    ChannelsFirstLinearAttention,
    ChannelsFirstMilaAttention,
)
from .cross_shaped import ChannelsFirstCrossShapedAttention
from .inline import ChannelsFirstInLineAttention, ChannelsFirstInLineTokenAttention
from .layers import (
    ChannelsFirstConcentration,
    ChannelsFirstMerging,
    ChannelsFirstMlp,
    ChannelsFirstSwiGlu,
    MapSize,
    NoForm,
    affine_channel_norm,
    convolution,
    norm_of,
    require,
    require_nothing,
)
from .pola import ChannelsFirstPolaAttention
from .positions import MapAngles
from .ttt import ChannelsFirstTttAttention
from .windows import ChannelsFirstWindowAttention

ATTENTIONS: dict[type[nn.Module], Callable[[Any, nn.Module, MapSize | None], nn.Module]] = {
    GatedAttention: ChannelsFirstGatedAttention,
    NormGatedAttention: ChannelsFirstGatedAttention,
    LinearAttention: ChannelsFirstLinearAttention,
    MilaAttention: ChannelsFirstMilaAttention,
    LightNetAttention: ChannelsFirstLightNetAttention,
    InLineAttention: ChannelsFirstInLineAttention,
    InLineTokenAttention: ChannelsFirstInLineTokenAttention,
    CrossShapedAttention: ChannelsFirstCrossShapedAttention,
    ShiftedWindowAttention: ChannelsFirstWindowAttention,
    PaddedWindowAttention: ChannelsFirstWindowAttention,
    PolaAttention: ChannelsFirstPolaAttention,
    TttAttention: ChannelsFirstTttAttention,
}
MLPS: dict[type[nn.Module], Callable[[Any, nn.Module], nn.Module]] = {
    ConvMlp: ChannelsFirstMlp,
    Mlp: ChannelsFirstMlp,
    SwiGlu: ChannelsFirstSwiGlu,
}


def _rule(rules: dict[type[nn.Module], Any], module: nn.Module) -> Any:
    """Function that makes the form of a module; raises `NoForm`."""
    if type(module) not in rules:
        raise NoForm(type(module).__name__)
    require(module, type(module))
    return rules[type(module)]


class ChannelsFirstBlock(nn.Module):
    """Attention and feed-forward network with norms, residuals and convolutions between.

    Those that a block of the model has not are `nn.Identity`.
    """

    def __init__(
        self, block: nn.Module, size: MapSize | None, pos1: str = "", pos2: str = ""
    ) -> None:
        """Take the parameters over.

        Args:
            block: With norm1, attn, drop_path1, norm2, mlp, drop_path2; perhaps norm3 and lcm.
            size: Of all maps; None where it varies.
            pos1: Name of its convolution before the attention's norm; empty for none.
            pos2: Name of that after the attention's residual.

        Raises:
            NoForm: A part of it has none.
        """
        super().__init__()
        norm1, norm2 = norm_of(block.norm1), norm_of(block.norm2)
        self.attn = _rule(ATTENTIONS, block.attn)(block.attn, block.norm1, size)
        for name in ("drop_path1", "ls1", "drop_path2", "ls2", "drop_path3"):
            require_nothing(getattr(block, name, nn.Identity()))
        self.pos1 = convolution(block.get_submodule(pos1)) if pos1 else nn.Identity()
        self.norm1 = norm1
        self.pos2 = convolution(block.get_submodule(pos2)) if pos2 else nn.Identity()
        self.local: nn.Module | None = None
        if hasattr(block, "lcm"):
            self.local = nn.Sequential(
                affine_channel_norm(block.norm3), ChannelsFirstConcentration(block.lcm)
            )
        # Attention whose kernels come from what has no norm.
        self.sees_input = isinstance(block, CrossShapedBlock)
        self.norm2 = norm2
        self.mlp = _rule(MLPS, block.mlp)(block.mlp, block.norm2)

    def forward(self, x: Tensor, *shared: Any) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        x = self.pos1(x)
        if self.sees_input:
            shared = (x, *shared)
        x = self.pos2(x + self.attn(self.norm1(x), *shared))
        if self.local is not None:
            x = x + self.local(x)
        return x + self.mlp(self.norm2(x))


# The names of the two positional convolutions of a block.
BLOCKS: dict[type[nn.Module], tuple[str, str]] = {
    PyramidBlock: ("pos", ""),
    NaLaBlock: ("pos", "pos2"),
    MilaBlock: ("pos1", "pos2"),
    L2WindowBlock: ("pos1", "pos2"),
    L2LinearBlock: ("pos1", ""),
    HViTTTBlock: ("pos", ""),
    HostBlock: ("", ""),
    CrossShapedBlock: ("", ""),
    PositionedTokenBlock: ("pos", ""),
    TokenBlock: ("", ""),
}


def block_of(block: nn.Module, size: MapSize | None) -> nn.Module:
    """A block on maps [B, C, H, W]; raises `NoForm`."""
    return ChannelsFirstBlock(block, size, *_rule(BLOCKS, block))


def num_heads(block: nn.Module) -> int:
    """Heads of the attention of a block."""
    attn = block.attn
    return (attn.attend if isinstance(attn, MilaAttention) else attn).num_heads


class ChannelsFirstStage(nn.Module):
    """`Stage` or `RotaryStage` whose blocks take maps [B, C, H, W]."""

    def __init__(self, stage: Stage, size: MapSize | None) -> None:
        """Take the parameters over.

        Args:
            stage: The stage.
            size: Of all maps that its blocks will see; None where it varies.

        Raises:
            NoForm: One of the blocks has none.
        """
        super().__init__()
        require(stage, Stage, RotaryStage)
        self.downsample = stage.downsample
        if isinstance(stage.downsample, MapMerging):
            self.downsample = ChannelsFirstMerging(stage.downsample)
        self.blocks = nn.ModuleList(block_of(block, size) for block in stage.blocks)
        self.angles: MapAngles | None = None
        if isinstance(stage, RotaryStage) and stage.blocks:
            self.angles = MapAngles(stage.rotary, num_heads(stage.blocks[0]), size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C, H', W']."""
        x = self.downsample(x)
        shared = () if self.angles is None else (self.angles(x),)
        for block in self.blocks:
            x = block(x, *shared)
        return x


class ChannelsFirstTokens(nn.Module):
    """All blocks of a model of one resolution, on tokens [B, C, 1, N], or on maps [B, C, H, W].

    Maps where its blocks see neighbours; all tokens are of the map then.
    """

    def __init__(self, blocks: nn.ModuleList, size: MapSize | None) -> None:
        """Take the parameters over.

        Args:
            blocks: Of the model.
            size: Of the map; None where it varies.

        Raises:
            NoForm: One of them has none.
        """
        super().__init__()
        self.takes_maps = any(isinstance(block, PositionedTokenBlock) for block in blocks)
        self.blocks = nn.ModuleList(block_of(block, size) for block in blocks)
        self.angles: MapAngles | None = None
        attn = blocks[0].attn
        self.tells_size = isinstance(attn, InLineTokenAttention)
        if isinstance(attn, LightNetAttention):
            tables = MapRotaryTables(attn.head_dim, cosine=True)
            self.angles = MapAngles(tables, attn.num_heads, size)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        shared: tuple[Any, ...] = (height, width) if self.tells_size else ()
        if self.angles is not None:
            shared = (self.angles(x.new_zeros(1, 1, height, width)),)
        if self.takes_maps:
            x = known_strides(split_axis(known_strides(x), 1, [height, width]).permute(0, 3, 1, 2))
        else:
            x = x.mT.unsqueeze(2)
        for block in self.blocks:
            x = block(x, *shared)
        return (x.flatten(2) if self.takes_maps else x.squeeze(2)).mT
