"""The four-stage pyramid that RALA, MALA and NaLaFormer share.

A convolutional stem, four stages of attention blocks with a strided convolution between them, a
1x1 convolution to the width of the head, and a linear classifier. A family brings the attention of
its blocks and a table of variants; see `vitlinear/models/ravlt.py`.

No `from __future__ import annotations` in files of models: torch.fx copies the annotations of
`forward` into the code it generates, and TorchScript cannot read them there as strings.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, LayerScale
from torch import Tensor, nn

from vitlinear.layers import (
    ConvMlp,
    ConvNormAct,
    ConvStem,
    GatedAttention,
    MapFullWidthRotaryTables,
    MapRotaryTables,
    ResidualDepthwiseConv,
    fold_scale,
    is_plain,
    recomputes,
)
from vitlinear.layers.band import LOCAL
from vitlinear.mixers import (
    AttentionSpec,
    GatedMixerAttention,
    find_mixer,
    make_mixer,
    split_spec,
)
from vitlinear.ops import MECHANISMS, RotaryTables, get_mechanism

from ._gradient_checkpointing import Block
from ._stages import RotaryStage, Stage, StagedBackbone, four_each, map_cfg

# The sizes that RALA and MALA share, as in the released code of both.
SIZES: dict[str, dict[str, Any]] = {
    "t": {
        "embed_dims": (64, 128, 256, 512),
        "depths": (2, 2, 6, 2),
        "num_heads": (1, 2, 4, 8),
        "ls_init_values": (1.0, 1.0, 1.0, 1.0),
    },
    "s": {
        "embed_dims": (64, 128, 320, 512),
        "depths": (3, 5, 9, 3),
        "num_heads": (1, 2, 5, 8),
        "ls_init_values": (1.0, 1.0, 1.0, 1.0),
    },
    "b": {
        "embed_dims": (96, 192, 384, 512),
        "depths": (4, 6, 12, 6),
        "num_heads": (1, 2, 6, 8),
        "ls_init_values": (1.0, 1.0, 1e-6, 1e-6),
    },
    "l": {
        "embed_dims": (96, 192, 448, 640),
        "depths": (4, 7, 19, 8),
        "num_heads": (1, 2, 7, 10),
        "ls_init_values": (1e-6, 1e-6, 1e-6, 1e-6),
    },
    # Ours, for tests and small data sets.
    "test": {
        "embed_dims": (24, 48, 64, 96),
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 2, 3),
        "mlp_ratios": (3.0, 3.0, 3.0, 3.0),
        "head_width": 192,
    },
}


def published_types(mechanism: str) -> tuple[str, ...]:
    """Attention of the stages in the published models: softmax in the last two."""
    return (mechanism, mechanism, "softmax", "softmax")


def linear_types(mechanism: str) -> tuple[str, ...]:
    """Attention of the stages in the ``_linear`` siblings, which nobody published."""
    return (mechanism,) * 4


def is_operator(attn_type: AttentionSpec) -> bool:
    """Whether an attention is a row of the operator, which the family's own layer runs.

    Others are mixers of `vitlinear.mixers`.
    """
    if not isinstance(attn_type, str):
        return False
    row = MECHANISMS.get(attn_type)
    return attn_type == "softmax" or (row is not None and not row.takes_powers)


def map_tables(attn_type: AttentionSpec, dim: int, num_heads: int) -> nn.Module:
    """The maker of the position tables of a stage, of the kind that its attention takes.

    Args:
        attn_type: A row of the operator, or a mixer.
        dim: Channels of the stage.
        num_heads: Its heads.

    Raises:
        ValueError: There is no such attention.
    """
    name, _ = split_spec(attn_type)
    if is_operator(attn_type):
        kind = "rotary" if name == "softmax" else get_mechanism(name).positions
    else:
        kind = find_mixer(name).kind_of_tables()
    if kind == "full width":
        return MapFullWidthRotaryTables()
    return MapRotaryTables(dim // num_heads, cosine=kind == "cosine")


def pyramid_cfg(test: bool = False, **kwargs: Any) -> dict[str, Any]:
    """timm's description of a pyramid's input and ends.

    Args:
        test: For a test-sized model.
        **kwargs: Source, licence and paper of the family.
    """
    return map_cfg(160 if test else 224, first_conv="stem.conv1.conv", **kwargs)


class PyramidBlock(Block):
    """Positional convolution, attention and feed-forward network, each with its residual.

    Attributes:
        attn_layer: Class of the attention; takes ``dim``, ``num_heads``, ``attn_type``,
            ``proj_drop``, ``backend``, ``device``, ``dtype``, and [B, H, W, C] with rotary tables.
        norms_gate: Whether its gate comes after a norm, as that of `NormGatedAttention`; mixers
            get a layer that is like it.
    """

    row_rule = LOCAL

    attn_layer: type[nn.Module] = GatedAttention
    norms_gate = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        attn_type: AttentionSpec,
        ls_init_value: float,
        proj_drop: float,
        drop_path: float,
        backend: str,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pos = ResidualDepthwiseConv(dim, 3, **dd)
        self.norm1 = LayerNorm(dim, eps=1e-6, **dd)
        if is_operator(attn_type):
            self.attn = self.attn_layer(
                dim, num_heads, attn_type, proj_drop=proj_drop, backend=backend, **dd
            )
        else:
            mixer = make_mixer(attn_type, dim, num_heads, backend=backend, **dd)
            self.attn = GatedMixerAttention(mixer, self.norms_gate, proj_drop, **dd)
        self.ls1 = LayerScale(dim, ls_init_value, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), proj_drop, **dd)
        self.ls2 = LayerScale(dim, ls_init_value, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, rotary: RotaryTables) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = self.pos(x)
        x = x + self.drop_path1(self.ls1(self.normed_attention(x, rotary)))
        x = x + self.drop_path2(self.ls2(self.normed_mlp(x)))
        return x

    @recomputes("norm1", "attn")
    def normed_attention(self, x: Tensor, rotary: RotaryTables) -> Tensor:
        """attn(norm1(x)), of which backward makes the norm again."""
        return self.attn(self.norm1(x), rotary)

    @recomputes("norm2", "mlp")
    def normed_mlp(self, x: Tensor) -> Tensor:
        """mlp(norm2(x)), of which backward makes the norm again."""
        return self.mlp(self.norm2(x))

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """This block with its layer-scales inside the projections before them.

        A subclass with a ``forward`` of its own is left as it is, unless it has this as well.
        """
        if is_plain(self, PyramidBlock):
            self.fold_scales()
        return self

    @torch.jit.ignore
    def fold_scales(self) -> None:
        """Fold the two layer-scales, where `normed_attention` and `normed_mlp` alone feed them."""
        self.attn, self.ls1 = fold_scale(
            self.attn, self.attn_layer, ("proj", "proj_drop"), self.ls1
        )
        self.mlp, self.ls2 = fold_scale(self.mlp, ConvMlp, ("fc2", "drop"), self.ls2)


class LinearPyramid(StagedBackbone):
    """Backbone and classifier; takes images of any size, square or not.

    The released training scripts decay the layer-scales, whose four axes hide them from the rule
    that spares parameters of one axis; here they have one, and timm's rule exempts them.

    Attributes:
        block_layer: Class of the blocks; a family with blocks of its own overrides it.
    """

    block_layer: type[PyramidBlock] = PyramidBlock

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratios: Sequence[float] = (3.5, 3.5, 3.5, 3.5),
        attn_types: Sequence[AttentionSpec] = ("elu", "elu", "softmax", "softmax"),
        head_width: int = 1024,
        ls_init_values: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the model.

        Args:
            in_chans: Channels of the image.
            num_classes: Classes; 0 leaves the classifier out.
            global_pool: ``'avg'``, ``'max'``, ``'avgmax'``, or ``''`` for a map of logits.
            embed_dims: Channels of each stage.
            depths: Blocks of each stage.
            num_heads: Attention heads of each stage.
            mlp_ratios: Hidden width of the feed-forward networks over the channels, by stage.
            attn_types: By stage, a linear mechanism of `vitlinear.ops.MECHANISMS`, ``'softmax'``,
                or another attention of `vitlinear.list_attentions()`; one with options is a
                mapping, such as ``{"name": "taylor", "degree": 1}``.
            head_width: Channels of the 1x1 convolution before pooling.
            ls_init_values: Initial layer-scale of each stage.
            drop_rate: Dropout rate before the classifier.
            proj_drop_rate: Dropout rate of the output of attentions and feed-forward networks.
            drop_path_rate: Stochastic depth rate of the last block, growing linearly from 0.
            attn_backend: One of `vitlinear.ops.BACKENDS`, for the linear attentions.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: The per-stage settings are not four each, or do not fit together.
            AssertionError: The pooling is not supported.
        """
        super().__init__(in_chans, num_classes, global_pool, drop_rate)
        four_each(
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            attn_types=attn_types,
            ls_init_values=ls_init_values,
        )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def downsample(i: int) -> nn.Module:
            return ConvNormAct(embed_dims[i - 1], embed_dims[i], 3, stride=2, **dd)

        def block(i: int, j: int, drop_path: float) -> Block:
            return self.block_layer(
                embed_dims[i],
                num_heads[i],
                mlp_ratios[i],
                attn_type=attn_types[i],
                ls_init_value=ls_init_values[i],
                proj_drop=proj_drop_rate,
                drop_path=drop_path,
                backend=attn_backend,
                **dd,
            )

        def stage(i: int, downsample: nn.Module, blocks: list[Block]) -> Stage:
            rotary = map_tables(attn_types[i], embed_dims[i], num_heads[i])
            return RotaryStage(downsample, blocks, rotary)

        self.stem = ConvStem(in_chans, embed_dims[0], **dd)
        self.make_stages(embed_dims, depths, drop_path_rate, downsample, block, stage)
        self.final = ConvNormAct(embed_dims[-1], head_width, 1, act=nn.SiLU(), **dd)
        self.make_head(head_width, global_pool, **dd)
