"""InLine-PVT: the pyramid vision transformer with InLine attention over whole maps.

`Bridging the Divide: Reconsidering Softmax and Linear Attention` (InLine, NeurIPS 2024)
- paper: https://arxiv.org/abs/2412.06590
- code and weights by the authors: https://github.com/LeapLabTHU/InLine

Written from the definition. All four stages attend linearly, to every token of their map.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, to_2tuple, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module
from vitlinear.facts import pretrained_source
from vitlinear.layers import AddMapPositions, check_images
from vitlinear.layers.attention.inline_attention import InLineAttention
from vitlinear.layers.band import LOCAL

from ._build import build_model
from ._inline import InLineBlock, inline_cfg
from ._stages import StagedBackbone, four_each

__all__ = ["InLinePVT"]


# One step to torch.fx, which cannot follow choices that look at shapes.
@register_notrace_module
class PositionedPatchEmbed(nn.Module):
    """Convolution of patches, layer norm, learned positions resized to the map."""

    row_rule = LOCAL

    def __init__(
        self,
        in_dim: int,
        dim: int,
        patch_size: int,
        grid_size: tuple[int, int],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch_size = patch_size
        self.grid_size = grid_size
        self.conv = nn.Conv2d(in_dim, dim, patch_size, patch_size, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, grid_size[0] * grid_size[1], dim, **dd))
        self.add_positions = AddMapPositions()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal positions."""
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Embed patches.

        Args:
            x: Images or a map, [B, in_dim, H, W]; channels are checked.

        Returns:
            [B, dim, H', W'] with H' = floor(H / patch_size), but at least 1: as released, an
            incomplete patch at the end of a side is left out.

        Raises:
            AssertionError: There is no batch axis, or another number of channels.
        """
        x = check_images(x, self.conv.in_channels)
        H, W, side = x.shape[2], x.shape[3], self.patch_size
        if side > H or side > W:
            x = F.pad(x, [0, max(side - W, 0), 0, max(side - H, 0)])
        x = self.norm(self.conv(x)).permute(0, 2, 3, 1)
        return self.add_positions(x, self.pos_embed, self.grid_size).permute(0, 3, 1, 2)


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
        height, width = to_2tuple(img_size)

        def patch_embed(i: int) -> nn.Module:
            side = 4 * 2**i
            return PositionedPatchEmbed(
                in_chans if i == 0 else embed_dims[i - 1],
                embed_dims[i],
                patch_size=4 if i == 0 else 2,
                grid_size=(max(height // side, 1), max(width // side, 1)),
                **dd,
            )

        def block(i: int, j: int, drop_path: float) -> InLineBlock:
            attn = InLineAttention(
                embed_dims[i], num_heads[i], 0, proj_drop_rate, attn_backend, **dd
            )
            return InLineBlock(
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
