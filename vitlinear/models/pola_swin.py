"""Pola-Swin: the shifted-window transformer with polarity-aware linear attention in two stages.

`PolaFormer: Polarity-aware Linear Attention for Vision Transformers` (ICLR 2025)
- paper: https://arxiv.org/abs/2501.15061
- code and weights by the authors: https://github.com/ZacharyMeng/PolaFormer

Written from the definition. The first two stages attend linearly in square windows of up to
56 x 56 tokens (96 at 384 pixels), that is to the whole map at the size that the models were trained
at; the late stages keep softmax in small windows. Both kinds are shifted in every other block,
where the windows are smaller than the map.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import nn

from vitlinear.facts import pretrained_source
from vitlinear.layers.attention.pola_attention import PolaAttention
from vitlinear.layers.attention.shifted_window_attention import ShiftedWindowAttention

from ._build import build_model
from ._hosts import HostBlock, ImageConvNorm, MapMerging
from ._pola import pola_cfg
from ._stages import StagedBackbone, four_each

__all__ = ["PolaSwin"]


class PolaSwin(StagedBackbone):
    """Backbone and classifier; takes images of any size, square or not."""

    default_convs = True

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        attn_types: Sequence[str] = ("pola", "pola", "softmax", "softmax"),
        pola_window_size: int = 56,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the model.

        Args:
            img_size: Size of the images whose windows there are learned positions and biases for;
                for others they are resized.
            in_chans: Channels of the image.
            num_classes: Classes; 0 leaves the classifier out.
            global_pool: ``'avg'``, ``'max'``, ``'avgmax'``, or ``''`` for a map of logits.
            embed_dim: Channels of the first stage; each stage has twice those before it.
            depths: Blocks of each stage.
            num_heads: Attention heads of each stage.
            attn_types: By stage, ``'pola'`` or ``'softmax'``.
            pola_window_size: Greatest side of the windows of Pola attention, in tokens.
            window_size: Greatest side of the windows of softmax attention, in tokens.
            mlp_ratio: Hidden width of the feed-forward networks over the channels.
            drop_rate: Dropout rate before the classifier.
            proj_drop_rate: Dropout rate of the output of attentions and feed-forward networks.
            drop_path_rate: Stochastic depth rate of the last block, growing linearly from 0.
            attn_backend: One of `vitlinear.ops.BACKENDS`, for the linear attentions.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: The per-stage settings are not four each, or do not fit together; or a
                window is empty.
            AssertionError: The pooling is not supported.
        """
        super().__init__(in_chans, num_classes, global_pool, drop_rate)
        four_each(depths=depths, num_heads=num_heads, attn_types=attn_types)
        if unknown := set(attn_types) - {"pola", "softmax"}:
            raise ValueError(f"unknown attention {min(unknown)!r}: give 'pola' or 'softmax'")
        if pola_window_size < 1:
            raise ValueError(f"a window needs a side of at least 1, got {pola_window_size}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dims = [embed_dim * 2**i for i in range(4)]
        shorter = min(to_2tuple(img_size))

        def downsample(i: int) -> nn.Module:
            return MapMerging(dims[i - 1], **dd)

        def block(i: int, j: int, drop_path: float) -> HostBlock:
            map_side = max(-(-shorter // (4 * 2**i)), 1)
            attn: nn.Module
            if attn_types[i] == "pola":
                side = min(pola_window_size, map_side)
                attn = PolaAttention(
                    dims[i],
                    num_heads[i],
                    (side, side),
                    pola_window_size,
                    shift=j % 2 == 1,
                    proj_drop=proj_drop_rate,
                    backend=attn_backend,
                    **dd,
                )
            else:
                attn = ShiftedWindowAttention(
                    dims[i],
                    num_heads[i],
                    window_size,
                    shift=j % 2 == 1,
                    proj_drop=proj_drop_rate,
                    backend=attn_backend,
                    square=True,
                    table_size=min(window_size, map_side),
                    **dd,
                )
            return HostBlock(dims[i], attn, mlp_ratio, 1e-5, proj_drop_rate, drop_path, **dd)

        self.stem = ImageConvNorm(in_chans, dims[0], 4, 4, 0, **dd)
        self.make_stages(dims, depths, drop_path_rate, downsample, block)
        self.final = LayerNorm2d(dims[-1], eps=1e-5, **dd)
        self.make_head(dims[-1], global_pool, **dd)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The tables of relative positions, as in the released training."""
        return {name for name, _ in self.named_parameters() if name.endswith("bias_table")}


BASE: dict[str, Any] = {
    "embed_dim": 128,
    "depths": (2, 2, 18, 2),
    "num_heads": (4, 8, 16, 32),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {"depths": (2, 2, 18, 2)},
    "base": BASE,
    "base_384": {**BASE, "img_size": 384, "pola_window_size": 96, "window_size": 12},
    # Ours, for tests and small data sets: windows of both kinds, shifted and not.
    "test": {
        "img_size": 160,
        "embed_dim": 16,
        "depths": (2, 1, 2, 1),
        "num_heads": (1, 2, 4, 4),
        "pola_window_size": 24,
        "window_size": 4,
        "mlp_ratio": 2.0,
    },
}

default_cfgs = generate_default_cfgs(
    {
        **{
            f"pola_swin_{x}.in1k": pola_cfg(**pretrained_source(f"pola_swin_{x}"))
            for x in ("tiny", "small", "base")
        },
        # Evaluated without a crop: the image is squeezed into a square.
        "pola_swin_base_384.in1k": pola_cfg(
            384, crop_pct=1.0, crop_mode="squash", **pretrained_source("pola_swin_base_384")
        ),
        "test_pola_swin.untrained": pola_cfg(160),
    }
)


@register_model
def pola_swin_tiny(pretrained: bool = False, **kwargs: Any) -> PolaSwin:
    """Pola-Swin-T: 29.3M parameters, 82.6% ImageNet-1K top-1 as published."""
    return build_model(PolaSwin, "pola_swin_tiny", pretrained, **{**VARIANTS["tiny"], **kwargs})


@register_model
def pola_swin_small(pretrained: bool = False, **kwargs: Any) -> PolaSwin:
    """Pola-Swin-S: 50.6M parameters, 83.6% ImageNet-1K top-1 as published."""
    return build_model(PolaSwin, "pola_swin_small", pretrained, **{**VARIANTS["small"], **kwargs})


@register_model
def pola_swin_base(pretrained: bool = False, **kwargs: Any) -> PolaSwin:
    """Pola-Swin-B: 89.1M parameters, 83.8% ImageNet-1K top-1 as published."""
    return build_model(PolaSwin, "pola_swin_base", pretrained, **{**VARIANTS["base"], **kwargs})


@register_model
def pola_swin_base_384(pretrained: bool = False, **kwargs: Any) -> PolaSwin:
    """Pola-Swin-B for images of 384 pixels: 91.6M parameters; no accuracy is published."""
    return build_model(
        PolaSwin, "pola_swin_base_384", pretrained, **{**VARIANTS["base_384"], **kwargs}
    )


@register_model
def test_pola_swin(pretrained: bool = False, **kwargs: Any) -> PolaSwin:
    """A small Pola-Swin for tests and small data sets."""
    return build_model(PolaSwin, "test_pola_swin", pretrained, **{**VARIANTS["test"], **kwargs})
