"""The layout of DeiT, which several families put their attention into.

DeiT is arXiv:2012.12877. A family brings the attention; see `vitlinear/models/linear_deit.py`.

No `from __future__ import annotations` in files of models: torch.fx copies the annotations of
`forward` into the code it generates, and TorchScript cannot read them there as strings.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm
from torch import nn

from vitlinear._timm import update_model_input_size
from vitlinear.layers import Mlp

from ._isotropic import IsotropicBackbone


class DeiT(IsotropicBackbone):
    """DeiT with the attention that a family brings, in all blocks."""

    def __init__(
        self,
        attn_layer: Callable[..., nn.Module],
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the model.

        Args:
            attn_layer: Takes ``dim``, ``num_heads``, ``proj_drop``, ``backend``, ``device`` and
                ``dtype``, and its instances what `TokenBlock` gives them.
            img_size: Size of the image whose grid the learned positions have.
            patch_size: Side of a patch in pixels.
            in_chans: Channels of the image.
            num_classes: Classes; 0 leaves the classifier out.
            global_pool: ``'token'`` for the class token, ``'avg'``, ``'max'``, ``'avgmax'``, or
                ``''`` for the logits of every token.
            embed_dim: Channels.
            depth: Blocks.
            num_heads: Attention heads.
            mlp_ratio: Hidden width of the feed-forward networks over the channels.
            drop_rate: Dropout rate before the classifier.
            pos_drop_rate: Dropout rate of the tokens before the first block.
            proj_drop_rate: Dropout rate of the output of attentions and feed-forward networks.
            drop_path_rate: Stochastic depth rate of the last block, growing linearly from 0.
            attn_backend: One of `vitlinear.ops.BACKENDS`.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: A number is too small, or the channels do not divide into heads.
            AssertionError: The pooling is not supported.
        """
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            num_classes,
            global_pool,
            embed_dim,
            depth,
            class_token=True,
            learned_positions=True,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            **dd,
        )

        def attn() -> nn.Module:
            return attn_layer(
                embed_dim, num_heads, proj_drop=proj_drop_rate, backend=attn_backend, **dd
            )

        def mlp() -> nn.Module:
            return Mlp(embed_dim, int(embed_dim * mlp_ratio), drop=proj_drop_rate, **dd)

        self.make_blocks(attn, mlp, partial(LayerNorm, eps=1e-6), drop_path_rate, **dd)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resize the learned positions to the grid of another image size, once for all.

        Images of any size work without it; it is for training at that size.

        Args:
            img_size: Height and width in pixels, or both in one.
        """
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(
            (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        )
        if self.patch_embed.grid_size != old_grid:
            with torch.no_grad():
                resized = self.add_positions.resized(
                    self.pos_embed, old_grid, *self.patch_embed.grid_size
                )
            self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        update_model_input_size(self, self.patch_embed.img_size)
