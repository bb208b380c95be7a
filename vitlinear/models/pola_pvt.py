"""Pola-PVT: the pyramid vision transformer with polarity-aware linear attention over whole maps.

`PolaFormer: Polarity-aware Linear Attention for Vision Transformers` (ICLR 2025)
- paper: https://arxiv.org/abs/2501.15061
- code and weights by the authors: https://github.com/ZacharyMeng/PolaFormer

Written from the definition. All four stages attend linearly, to every token of their map.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module
from vitlinear.facts import pretrained_source
from vitlinear.layers.attention.pola_attention import PolaAttention
from vitlinear.layers.band import LOCAL

from ._build import build_model
from ._hosts import HostBlock, pvt_grid_size, pvt_patch_embed
from ._pola import pola_cfg
from ._stages import StagedBackbone, four_each

__all__ = ["PolaPVT"]


# One step to torch.fx, which cannot follow the choice.
@register_notrace_module
class UnappliedNorm(LayerNorm2d):
    """A norm that the released models hold and never apply: what goes in comes out.

    Its parameters are counted, saved and loaded. Their gradient is zero, so that training in
    parallel, which waits for one of each parameter, does not wait in vain.
    """

    row_rule = LOCAL

    unapplied = True

    def forward(self, x: Tensor) -> Tensor:
        """x itself."""
        if torch.is_grad_enabled() and not torch.jit.is_tracing():
            x = x + 0 * (self.weight.sum() + self.bias.sum()).to(x.dtype)
        return x

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Nothing."""
        return nn.Identity()


class PolaPVT(StagedBackbone):
    """Backbone and classifier; takes images of any size, square or not."""

    rounds_down = True
    default_convs = True

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the model.

        Args:
            img_size: Size of the images for which there are learned positions for each token, of
                each stage and of the keys of each attention; for others they are resized.
            in_chans: Channels of the image.
            num_classes: Classes; 0 leaves the classifier out.
            global_pool: ``'avg'``, ``'max'``, ``'avgmax'``, or ``''`` for a map of logits.
            embed_dims: Channels of each stage.
            depths: Blocks of each stage.
            num_heads: Attention heads of each stage.
            mlp_ratios: Hidden width of the feed-forward networks over the channels, by stage.
            drop_rate: Dropout rate before the classifier.
            proj_drop_rate: Dropout rate of the output of attentions and feed-forward networks.
            drop_path_rate: Stochastic depth rate of the last block, growing linearly from 0.
            attn_backend: One of `vitlinear.ops.BACKENDS`.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: The per-stage settings are not four each, or do not fit together.
            AssertionError: The pooling is not supported.
        """
        super().__init__(in_chans, num_classes, global_pool, drop_rate)
        four_each(embed_dims=embed_dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def patch_embed(i: int) -> nn.Module:
            return pvt_patch_embed(i, img_size, in_chans, embed_dims, **dd)

        def block(i: int, j: int, drop_path: float) -> HostBlock:
            attn = PolaAttention(
                embed_dims[i],
                num_heads[i],
                pvt_grid_size(img_size, i),
                proj_drop=proj_drop_rate,
                backend=attn_backend,
                **dd,
            )
            return HostBlock(
                embed_dims[i], attn, mlp_ratios[i], 1e-6, proj_drop_rate, drop_path, **dd
            )

        self.stem = patch_embed(0)
        self.make_stages(embed_dims, depths, drop_path_rate, patch_embed, block)
        self.final = UnappliedNorm(embed_dims[-1], eps=1e-6, **dd)
        self.make_head(embed_dims[-1], global_pool, **dd)


VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {"depths": (2, 2, 2, 2)},
    "small": {"depths": (3, 4, 6, 3)},
    "medium": {"depths": (3, 4, 18, 3)},
    "base": {"depths": (3, 8, 27, 3)},
    # Ours, for tests and small data sets.
    "test": {
        "img_size": 160,
        "embed_dims": (16, 32, 48, 64),
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 3, 4),
        "mlp_ratios": (4.0, 4.0, 3.0, 3.0),
    },
}

default_cfgs = generate_default_cfgs(
    {
        **{
            f"pola_pvt_{x}.in1k": pola_cfg(**pretrained_source(f"pola_pvt_{x}"))
            for x in ("tiny", "small", "medium", "base")
        },
        "test_pola_pvt.untrained": pola_cfg(160),
    }
)


@register_model
def pola_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> PolaPVT:
    """Pola-PVT-T: 12.9M parameters, 78.8% ImageNet-1K top-1 as published."""
    return build_model(PolaPVT, "pola_pvt_tiny", pretrained, **{**VARIANTS["tiny"], **kwargs})


@register_model
def pola_pvt_small(pretrained: bool = False, **kwargs: Any) -> PolaPVT:
    """Pola-PVT-S: 23.2M parameters, 81.9% ImageNet-1K top-1 as published."""
    return build_model(PolaPVT, "pola_pvt_small", pretrained, **{**VARIANTS["small"], **kwargs})


@register_model
def pola_pvt_medium(pretrained: bool = False, **kwargs: Any) -> PolaPVT:
    """Pola-PVT-M: 40.0M parameters; no accuracy is published."""
    return build_model(PolaPVT, "pola_pvt_medium", pretrained, **{**VARIANTS["medium"], **kwargs})


@register_model
def pola_pvt_base(pretrained: bool = False, **kwargs: Any) -> PolaPVT:
    """Pola-PVT-B, `large` in the authors' code: 54.4M parameters; no accuracy is published."""
    return build_model(PolaPVT, "pola_pvt_base", pretrained, **{**VARIANTS["base"], **kwargs})


@register_model
def test_pola_pvt(pretrained: bool = False, **kwargs: Any) -> PolaPVT:
    """A small Pola-PVT for tests and small data sets."""
    return build_model(PolaPVT, "test_pola_pvt", pretrained, **{**VARIANTS["test"], **kwargs})
