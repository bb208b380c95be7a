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
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm,
    LayerScale,
    calculate_drop_path_rates,
)
from torch import Tensor, nn

from vitlinear._timm import register_notrace_function
from vitlinear.layers import (
    ConvMlp,
    ConvNormAct,
    ConvStem,
    GatedAttention,
    ResidualDepthwiseConv,
    fold_scale,
    run_recomputing,
)
from vitlinear.ops import (
    RotaryTables,
    accumulation_dtype,
    get_mechanism,
    lrpe_tables,
    rotary_tables,
)

from ._gradient_checkpointing import checkpoint
from ._stages import StagedBackbone, four_each, map_cfg

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


def pyramid_cfg(test: bool = False, **kwargs: Any) -> dict[str, Any]:
    """timm's description of a pyramid's input and ends.

    Args:
        test: For a test-sized model.
        **kwargs: Source, licence and paper of the family.
    """
    return map_cfg(160 if test else 224, first_conv="stem.conv1.conv", **kwargs)


@register_notrace_function
def stage_rotary_tables(x: Tensor, head_dim: int, cosine: bool = False) -> RotaryTables:
    """Tables for a map [B, C, H, W]; one traced step, whatever the size of the map.

    Args:
        x: The map.
        head_dim: Channels of a head.
        cosine: Make those of LightNet's cosine encoding.
    """
    dtype = accumulation_dtype(x.dtype)
    if cosine:
        return lrpe_tables(x.shape[2], x.shape[3], head_dim, x.device, dtype)
    return rotary_tables(x.shape[2], x.shape[3], head_dim, x.device, dtype)


class PyramidBlock(nn.Module):
    """Positional convolution, attention and feed-forward network, each with its residual.

    Attributes:
        attn_layer: Class of the attention; takes ``dim``, ``num_heads``, ``attn_type``,
            ``proj_drop``, ``backend``, ``device``, ``dtype``, and [B, H, W, C] with rotary tables.
    """

    attn_layer: type[nn.Module] = GatedAttention

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        attn_type: str,
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
        self.attn = self.attn_layer(
            dim, num_heads, attn_type, proj_drop=proj_drop, backend=backend, **dd
        )
        self.ls1 = LayerScale(dim, ls_init_value, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), proj_drop, **dd)
        self.ls2 = LayerScale(dim, ls_init_value, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, rotary: RotaryTables) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = self.pos(x)
        if torch.jit.is_scripting():
            x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), rotary)))
            x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        else:
            y = run_recomputing((self.norm1, self.attn), x, rotary)
            x = x + self.drop_path1(self.ls1(y))
            y = run_recomputing((self.norm2, self.mlp), x)
            x = x + self.drop_path2(self.ls2(y))
        return x

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """This block with its layer-scales inside the projections before them."""
        self.ls1 = fold_scale(self.attn.proj, self.ls1)
        self.ls2 = fold_scale(self.mlp.fc2, self.ls2)
        return self


class PyramidStage(nn.Module):
    """Downsampling, then blocks, on maps [B, C, H, W] that are channels-last in memory."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        drop_paths: Sequence[float],
        num_heads: int,
        downsample: bool,
        attn_type: str,
        block_layer: type[PyramidBlock],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **block_args: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.downsample = (
            ConvNormAct(in_dim, dim, 3, stride=2, **dd) if downsample else nn.Identity()
        )
        self.blocks = nn.ModuleList(
            block_layer(dim, num_heads, attn_type=attn_type, drop_path=rate, **block_args, **dd)
            for rate in drop_paths
        )
        self.head_dim = dim // num_heads
        linear = attn_type != "softmax"
        self.cosine = linear and get_mechanism(attn_type).positions == "cosine"

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C, H', W']."""
        x = self.downsample(x)
        rotary = stage_rotary_tables(x, self.head_dim, self.cosine)
        x = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, rotary)
            else:
                x = block(x, rotary)
        return x.permute(0, 3, 1, 2)


class LinearPyramid(StagedBackbone):
    """Backbone and classifier; takes images of any size, square or not.

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
        attn_types: Sequence[str] = ("elu", "elu", "softmax", "softmax"),
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
            attn_types: By stage, a linear mechanism of `vitlinear.ops.MECHANISMS` or
                ``'softmax'``.
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

        self.stem = ConvStem(in_chans, embed_dims[0], **dd)
        drop_paths = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.stages = nn.Sequential(
            *(
                PyramidStage(
                    embed_dims[max(i - 1, 0)],
                    embed_dims[i],
                    drop_paths=[next(drop_paths) for _ in range(depths[i])],
                    num_heads=num_heads[i],
                    downsample=i > 0,
                    mlp_ratio=mlp_ratios[i],
                    attn_type=attn_types[i],
                    block_layer=self.block_layer,
                    ls_init_value=ls_init_values[i],
                    proj_drop=proj_drop_rate,
                    backend=attn_backend,
                    **dd,
                )
                for i in range(4)
            )
        )
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"}
            for i, dim in enumerate(embed_dims)
        ]
        self.final = ConvNormAct(embed_dims[-1], head_width, 1, act=nn.SiLU(), **dd)
        self.num_features = self.head_hidden_size = head_width
        # A 1x1 convolution, as released: without pooling it gives a map of logits.
        self.head = ClassifierHead(
            head_width, num_classes, global_pool, drop_rate, use_conv=True, **dd
        )
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beyond the usual one-dimensional ones: none.

        The released training scripts decay the layer-scales, whose four axes hide them from that
        rule; here they have one axis and timm's rule exempts them.
        """
        return set()
