"""InLine-PVT: the pyramid vision transformer with InLine attention over whole maps.

`Bridging the Divide: Reconsidering Softmax and Linear Attention` (InLine, NeurIPS 2024)
- paper: https://arxiv.org/abs/2412.06590
- code and weights by the authors: https://github.com/LeapLabTHU/InLine

Written from the definition. All four stages attend linearly, to every token of their map.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from vitlinear.facts import pretrained_source
from vitlinear.layers.attention.inline_attention import InLineAttention

from ._build import build_model
from ._hosts import HostBlock, pvt_patch_embed
from ._inline import inline_cfg
from ._stages import StagedBackbone, four_each

__all__ = ["InLinePVT"]


class InLinePVT(StagedBackbone):
    """Backbone and classifier; takes images of any size, square or not."""

    rounds_down = True

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (2, 4, 10, 16),
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
            img_size: Size of the images for which there is a learned position for each token;
                for others the positions are resized.
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
            attn = InLineAttention(
                embed_dims[i], num_heads[i], 0, proj_drop_rate, attn_backend, **dd
            )
            return HostBlock(
                embed_dims[i], attn, mlp_ratios[i], 1e-6, proj_drop_rate, drop_path, **dd
            )

        self.stem = patch_embed(0)
        self.make_stages(embed_dims, depths, drop_path_rate, patch_embed, block)
        self.final = nn.Identity()
        self.make_head(embed_dims[-1], global_pool, **dd)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The learned positions, as in the released training."""
        return {name for name, _ in self.named_parameters() if name.endswith("pos_embed")}


VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {"depths": (2, 2, 2, 2)},
    "small": {"depths": (3, 4, 6, 3)},
    "medium": {"depths": (3, 4, 18, 3)},
    "large": {"depths": (3, 8, 27, 3)},
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
            f"inline_pvt_{x}.in1k": inline_cfg(**pretrained_source(f"inline_pvt_{x}"))
            for x in ("tiny", "small", "medium", "large")
        },
        "test_inline_pvt.untrained": inline_cfg(160),
    }
)


@register_model
def inline_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> InLinePVT:
    """InLine-PVT-T: 12.0M parameters, 78.2% ImageNet-1K top-1 as published."""
    return build_model(InLinePVT, "inline_pvt_tiny", pretrained, **{**VARIANTS["tiny"], **kwargs})


@register_model
def inline_pvt_small(pretrained: bool = False, **kwargs: Any) -> InLinePVT:
    """InLine-PVT-S: 21.6M parameters, 82.0% ImageNet-1K top-1 as published."""
    return build_model(InLinePVT, "inline_pvt_small", pretrained, **{**VARIANTS["small"], **kwargs})


@register_model
def inline_pvt_medium(pretrained: bool = False, **kwargs: Any) -> InLinePVT:
    """InLine-PVT-M: 37.6M parameters, 83.2% ImageNet-1K top-1 as published."""
    return build_model(
        InLinePVT, "inline_pvt_medium", pretrained, **{**VARIANTS["medium"], **kwargs}
    )


@register_model
def inline_pvt_large(pretrained: bool = False, **kwargs: Any) -> InLinePVT:
    """InLine-PVT-L: 51.2M parameters (50.2M as published), 83.6% ImageNet-1K top-1 as published."""
    return build_model(InLinePVT, "inline_pvt_large", pretrained, **{**VARIANTS["large"], **kwargs})


@register_model
def test_inline_pvt(pretrained: bool = False, **kwargs: Any) -> InLinePVT:
    """A small InLine-PVT for tests and small data sets."""
    return build_model(InLinePVT, "test_inline_pvt", pretrained, **{**VARIANTS["test"], **kwargs})
