"""A family as CONTRIBUTING describes one, for `test_new_family.py`: a layer, a block, two tables.

The one is a pyramid of four stages, the other a row of tokens. A real family has one of them, its
layer stands in a file under `vitlinear/layers/`, and its imports begin in the same way: the test
puts this file beside the families.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, LayerNorm2d
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitlinear._timm import register_notrace_module
from vitlinear.layers import ConvNormAct, ConvStem, LinearAttention, Mlp
from vitlinear.layers.attention.inline_attention import mean_token
from vitlinear.layers.padding_rule import MASK

from ._build import build_model
from ._gradient_checkpointing import Block
from ._isotropic import IsotropicBackbone, token_cfg
from ._stages import StagedBackbone, four_each, map_cfg

__all__ = ["ToyPyramid", "ToyRow"]


@register_notrace_module
class MeanAttention(nn.Module):
    """Linear attention to tokens, each with the mean of all added."""

    padding_rule = MASK

    def __init__(self, dim: int, num_heads: int, proj_drop: float, backend: str, **dd: Any) -> None:
        super().__init__()
        self.linear = LinearAttention(
            dim, num_heads, "relu", proj_drop=proj_drop, backend=backend, **dd
        )

    def forward(
        self, x: Tensor, height: int = 0, width: int = 0, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """[B, N, C] or [B, H, W, C] -> the same shape."""
        mask: Tensor | None = None
        if key_padding_mask is not None:
            mask = key_padding_mask.flatten(1)
        mean = mean_token(x.flatten(1, -2), mask).unsqueeze(1)
        x = (x.flatten(1, -2) + mean).reshape(x.shape)
        return self.linear(x, height, width, key_padding_mask)


class ToyBlock(Block):
    """Attention and feed-forward network on a map, each after a norm and with its residual."""

    def __init__(
        self, dim: int, attn: nn.Module, proj_drop: float, drop_path: float, **dd: Any
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, 2 * dim, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class ToyPyramid(StagedBackbone):
    """Backbone and classifier; takes images of any size."""

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (8, 16, 24, 32),
        depths: Sequence[int] = (1, 1, 2, 1),
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chans, num_classes, global_pool, drop_rate)
        four_each(embed_dims=embed_dims, depths=depths)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def downsample(i: int) -> nn.Module:
            return ConvNormAct(embed_dims[i - 1], embed_dims[i], 3, stride=2, **dd)

        def block(i: int, j: int, drop_path: float) -> Block:
            attn = MeanAttention(embed_dims[i], 2, proj_drop_rate, attn_backend, **dd)
            return ToyBlock(embed_dims[i], attn, proj_drop_rate, drop_path, **dd)

        self.stem = ConvStem(in_chans, embed_dims[0], **dd)
        self.make_stages(embed_dims, depths, drop_path_rate, downsample, block)
        self.final = LayerNorm2d(embed_dims[-1], **dd)
        self.make_head(embed_dims[-1], global_pool, **dd)


class ToyRow(IsotropicBackbone):
    """Backbone and classifier; takes images of any size."""

    def __init__(
        self,
        img_size: int = 64,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 32,
        depth: int = 4,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            img_size,
            16,
            in_chans,
            num_classes,
            global_pool,
            embed_dim,
            depth,
            class_token=True,
            learned_positions=True,
            drop_rate=drop_rate,
            pos_drop_rate=0.0,
            **dd,
        )

        def attn() -> nn.Module:
            return MeanAttention(embed_dim, 2, proj_drop_rate, attn_backend, **dd)

        def mlp() -> nn.Module:
            return Mlp(embed_dim, 2 * embed_dim, drop=proj_drop_rate, **dd)

        self.make_blocks(attn, mlp, LayerNorm, drop_path_rate, **dd)


default_cfgs = generate_default_cfgs(
    {
        "test_new_pyramid.untrained": map_cfg(64, first_conv="stem.conv1.conv"),
        "test_new_row.untrained": token_cfg(64, fixed_input_size=True),
    }
)


@register_model
def test_new_pyramid(pretrained: bool = False, **kwargs: Any) -> ToyPyramid:
    """A pyramid for tests."""
    return build_model(ToyPyramid, "test_new_pyramid", pretrained, **kwargs)


@register_model
def test_new_row(pretrained: bool = False, **kwargs: Any) -> ToyRow:
    """A row of tokens for tests."""
    return build_model(ToyRow, "test_new_row", pretrained, **kwargs)
