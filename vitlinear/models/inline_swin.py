"""InLine-Swin: the shifted-window transformer with InLine attention in its early blocks.

`Bridging the Divide: Reconsidering Softmax and Linear Attention` (InLine, NeurIPS 2024)
- paper: https://arxiv.org/abs/2412.06590
- code and weights by the authors: https://github.com/LeapLabTHU/InLine

Written from the definition. InLine blocks attend in windows of up to 56 x 56 tokens (96 at 384
pixels), that is to the whole map at the size that the models were trained at; the blocks of the
late stages keep softmax in small shifted windows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d
from timm.models import generate_default_cfgs, register_model
from torch import nn

from vitlinear.facts import pretrained_source
from vitlinear.layers.attention.inline_attention import InLineAttention
from vitlinear.layers.attention.shifted_window_attention import ShiftedWindowAttention

from ._build import build_model
from ._hosts import HostBlock, ImageConvNorm, MapMerging
from ._inline import inline_cfg
from ._stages import StagedBackbone, four_each

__all__ = ["InLineSwin"]


class InLineSwin(StagedBackbone):
    """Backbone and classifier; takes images of any size, square or not."""

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        num_inline: Sequence[int] = (2, 2, 6, 0),
        inline_window_size: int = 56,
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
            in_chans: Channels of the image.
            num_classes: Classes; 0 leaves the classifier out.
            global_pool: ``'avg'``, ``'max'``, ``'avgmax'``, or ``''`` for a map of logits.
            embed_dim: Channels of the first stage; each stage has twice those before it.
            depths: Blocks of each stage.
            num_heads: Attention heads of each stage.
            num_inline: Blocks of each stage that have InLine attention, the first ones; those
                that follow have softmax.
            inline_window_size: Greatest side of the windows of InLine attention, in tokens.
            window_size: Side of the windows of softmax attention, in tokens.
            mlp_ratio: Hidden width of the feed-forward networks over the channels.
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
        four_each(depths=depths, num_heads=num_heads, num_inline=num_inline)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dims = [embed_dim * 2**i for i in range(4)]

        def downsample(i: int) -> nn.Module:
            return MapMerging(dims[i - 1], **dd)

        def block(i: int, j: int, drop_path: float) -> HostBlock:
            attn: nn.Module
            if j < num_inline[i]:
                attn = InLineAttention(
                    dims[i], num_heads[i], inline_window_size, proj_drop_rate, attn_backend, **dd
                )
            else:
                attn = ShiftedWindowAttention(
                    dims[i],
                    num_heads[i],
                    window_size,
                    shift=j % 2 == 1,
                    proj_drop=proj_drop_rate,
                    backend=attn_backend,
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
    "num_inline": (2, 2, 2, 0),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {"depths": (2, 2, 18, 2), "num_inline": (2, 2, 0, 0)},
    "base": BASE,
    "base_384": {**BASE, "inline_window_size": 96, "window_size": 12},
    # Ours, for tests and small data sets: windows of both kinds in one stage, shifted and not.
    "test": {
        "embed_dim": 16,
        "depths": (1, 1, 3, 1),
        "num_heads": (1, 2, 4, 4),
        "num_inline": (1, 1, 1, 0),
        "inline_window_size": 24,
        "window_size": 4,
        "mlp_ratio": 2.0,
    },
}

default_cfgs = generate_default_cfgs(
    {
        **{
            f"inline_swin_{x}.in1k": inline_cfg(**pretrained_source(f"inline_swin_{x}"))
            for x in ("tiny", "small", "base")
        },
        "inline_swin_base_384.in1k": inline_cfg(384, crop_pct=1.0),
        "test_inline_swin.untrained": inline_cfg(160),
    }
)


@register_model
def inline_swin_tiny(pretrained: bool = False, **kwargs: Any) -> InLineSwin:
    """InLine-Swin-T: 29.2M parameters, 82.4% ImageNet-1K top-1 as published."""
    return build_model(InLineSwin, "inline_swin_tiny", pretrained, **{**VARIANTS["tiny"], **kwargs})


@register_model
def inline_swin_small(pretrained: bool = False, **kwargs: Any) -> InLineSwin:
    """InLine-Swin-S: 49.8M parameters, 83.6% ImageNet-1K top-1 as published."""
    return build_model(
        InLineSwin, "inline_swin_small", pretrained, **{**VARIANTS["small"], **kwargs}
    )


@register_model
def inline_swin_base(pretrained: bool = False, **kwargs: Any) -> InLineSwin:
    """InLine-Swin-B: 88.4M parameters, 84.1% ImageNet-1K top-1 as published."""
    return build_model(InLineSwin, "inline_swin_base", pretrained, **{**VARIANTS["base"], **kwargs})


@register_model
def inline_swin_base_384(pretrained: bool = False, **kwargs: Any) -> InLineSwin:
    """InLine-Swin-B for images of 384 pixels: 88.5M parameters; no accuracy is published."""
    return build_model(
        InLineSwin, "inline_swin_base_384", pretrained, **{**VARIANTS["base_384"], **kwargs}
    )


@register_model
def test_inline_swin(pretrained: bool = False, **kwargs: Any) -> InLineSwin:
    """A small InLine-Swin for tests and small data sets."""
    return build_model(InLineSwin, "test_inline_swin", pretrained, **{**VARIANTS["test"], **kwargs})
