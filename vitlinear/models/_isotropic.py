"""The skeleton of backbones of one resolution: patches, blocks on a row of tokens, a classifier.

A family calls `make_blocks` in its constructor; see `vitlinear/models/lightnet.py`. Tokens are
[B, N, C]; those of the map stand last, row by row.

No `from __future__ import annotations` in files of models: torch.fx copies the annotations of
`forward` into the code it generates, and TorchScript cannot read them there as strings.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    PatchEmbed,
    calculate_drop_path_rates,
    get_device_dtype,
    global_pool_nlc,
    to_2tuple,
)
from torch import Tensor, nn

from vitlinear._timm import feature_take_indices, register_notrace_module
from vitlinear.layers import AddTokenPositions, check_images, known_layout
from vitlinear.layers.band import LOCAL
from vitlinear.layers.init_normal import init_normal_

from ._build import imagenet_cfg
from ._contract import POOLINGS, TimmBackbone
from ._gradient_checkpointing import Block


def token_cfg(side: int = 224, **kwargs: Any) -> dict[str, Any]:
    """A ``pretrained_cfg`` for square images of this side; see `imagenet_cfg`."""
    return imagenet_cfg(side, first_conv="patch_embed.proj", classifier="head", **kwargs)


class TokenBlock(Block):
    """Attention and feed-forward network, each after a norm and with its residual."""

    row_rule = LOCAL

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp: nn.Module,
        norm_layer: Callable[..., nn.Module],
        drop_path: float,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the block.

        Args:
            dim: Channels, C.
            attn: Takes tokens [B, N, C], and height and width of the map among them.
            mlp: Takes tokens.
            norm_layer: Takes ``dim``, ``device`` and ``dtype``.
            drop_path: Stochastic depth rate.
            device: Where the parameters live.
            dtype: Type of the parameters.
        """
        super().__init__()
        self.norm1 = norm_layer(dim, device=device, dtype=dtype)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm_layer(dim, device=device, dtype=dtype)
        self.mlp = mlp
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        x = x + self.drop_path1(self.attn(self.norm1(x), height, width))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class CeilPatchEmbed(PatchEmbed):
    """Patches of images that are padded with zeros to whole ones; arguments as `PatchEmbed`.

    The grid of a size is that of its images: timm's leaves out what is beyond the last whole patch.
    """

    def _init_img_size(self, img_size: Any) -> Any:
        size = None if img_size is None else to_2tuple(img_size)
        pairs = zip(size or (), self.patch_size, strict=False)
        whole = [-(-side // patch) * patch for side, patch in pairs] or None
        _, grid_size, num_patches = super()._init_img_size(whole)
        return size, grid_size, num_patches


# One step to torch.fx, which cannot follow choices that look at shapes.
@register_notrace_module
class FloorPatchEmbed(PatchEmbed):
    """Patches that leave out what is beyond the last whole one; arguments as `PatchEmbed`.

    Images smaller than a patch are padded with zeros to one.
    """

    row_rule = LOCAL

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, floor(H / patch_size), floor(W / patch_size), C]."""
        height, width = self.patch_size[0], self.patch_size[1]
        if x.shape[2] < height or x.shape[3] < width:
            x = F.pad(x, [0, max(width - x.shape[3], 0), 0, max(height - x.shape[2], 0)])
        return self.norm(self.proj(known_layout(x)).permute(0, 2, 3, 1))


class IsotropicBackbone(TimmBackbone):
    """Patches, blocks, norm and classifier; takes images of any size, square or not.

    Images are padded with zeros to whole patches, to the right and below; models with `rounds_down`
    leave incomplete patches out instead. Learned positions are
    resized to the grid of the image; at the size that they were learned at they are added as they
    are.

    Attributes:
        position: What positions a map [B, H, W, C] gets before its tokens are laid in a row;
            nothing unless a subclass sets it.
        blocks: By `make_blocks`.
        norm: Norm after the last block; by `make_blocks`.
    """

    feature_cfg = {"out_indices": 3, "feature_cls": "getter"}

    def __init__(
        self,
        img_size: int | tuple[int, int] | None,
        patch_size: int,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        embed_dim: int,
        depth: int,
        class_token: bool,
        learned_positions: bool,
        drop_rate: float,
        pos_drop_rate: float,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make all but what `make_blocks` makes.

        Args:
            img_size: Size of the image whose grid the learned positions have; None without them.
            patch_size: Side of a patch in pixels.
            in_chans: Channels of the image.
            num_classes: Classes; 0 leaves the classifier out.
            global_pool: ``'avg'``, ``'max'``, ``'avgmax'``, ``'token'`` if there is a class token,
                or ``''`` for the logits of every token.
            embed_dim: Channels, C.
            depth: Blocks.
            class_token: Put a learned token before those of the map.
            learned_positions: Add a learned position to every token.
            drop_rate: Dropout rate before the classifier.
            pos_drop_rate: Dropout rate of the tokens before the first block.
            device: Where the parameters live.
            dtype: Type of the parameters.

        Raises:
            ValueError: A number is too small.
            AssertionError: The pooling is not supported.
        """
        poolings = (*POOLINGS, "token") if class_token else POOLINGS
        super().__init__(in_chans, num_classes, global_pool, drop_rate, poolings)
        if depth < 1:
            raise ValueError(f"the model needs at least one block, got depth {depth}")
        if min(to_2tuple(patch_size)) < 1:
            raise ValueError(f"patches have at least one pixel, got patch_size {patch_size}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1 if class_token else 0
        self.global_pool = global_pool
        self.set_features("blocks", [embed_dim] * depth, [max(to_2tuple(patch_size))] * depth)

        patch_layer = FloorPatchEmbed if self.rounds_down else CeilPatchEmbed
        self.patch_embed = patch_layer(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            output_fmt="NHWC",
            strict_img_size=False,
            dynamic_img_pad=True,
            **dd,
        )
        self.position: nn.Module = nn.Identity()
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if class_token else None
        self.pos_embed = None
        if learned_positions:
            length = self.num_prefix_tokens + self.patch_embed.num_patches
            self.pos_embed = nn.Parameter(torch.empty(1, length, embed_dim, **dd))
        self.add_positions = AddTokenPositions(self.num_prefix_tokens)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.blocks: nn.ModuleList
        self.norm: nn.Module

    def make_blocks(
        self,
        attn: Callable[[], nn.Module],
        mlp: Callable[[], nn.Module],
        norm_layer: Callable[..., nn.Module],
        drop_path_rate: float,
        block: type[TokenBlock] = TokenBlock,
        **dd: Any,
    ) -> None:
        """Set `blocks`, `norm` and the classifier; the last step of a constructor.

        Args:
            attn: Makes the attention of a block; see `TokenBlock`.
            mlp: Makes its feed-forward network.
            norm_layer: Takes ``dim``, ``device`` and ``dtype``.
            drop_path_rate: Stochastic depth rate of the last block, growing linearly from 0.
            block: Class of the blocks.
            **dd: Where the parameters live, and their type.
        """
        rates = calculate_drop_path_rates(drop_path_rate, len(self.feature_info))
        self.blocks = nn.ModuleList(
            block(self.embed_dim, attn(), mlp(), norm_layer, rate, **dd) for rate in rates
        )
        self.norm = norm_layer(self.embed_dim, **dd)
        # Last, where timm looks for it: clipping by ``agc`` leaves the last parameters out.
        self.head_drop = nn.Dropout(self.drop_rate)
        self.head = self.make_head(self.num_classes, **dd)
        self.init_weights(needs_reset=False)

    def make_head(
        self,
        num_classes: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """A classifier, or nothing for 0 classes."""
        if num_classes == 0:
            return nn.Identity()
        return nn.Linear(self.embed_dim, num_classes, device=device, dtype=dtype)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """As `TimmBackbone`; a truncated normal also for the class token and the positions."""
        super().init_weights(mode, needs_reset)
        for parameter in (self.cls_token, self.pos_embed):
            if parameter is not None:
                init_normal_(parameter, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Positions and class token, where there are some."""
        return {name for name in ("pos_embed", "cls_token") if getattr(self, name) is not None}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters into layers, for layer-wise decay."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed|^position",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def blocks_by_stage(self) -> Sequence[Any]:
        """The blocks, which are one stage."""
        return [self.blocks]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def set_classifier(self, num_classes: int, global_pool: str | None) -> None:
        """Make the classifier anew."""
        if global_pool is not None:
            self.global_pool = global_pool
        self.head = self.make_head(num_classes, **get_device_dtype(self)).train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Forward pass that also returns what blocks put out.

        Args:
            x: Images, [B, in_chans, H, W].
            indices: The last n blocks if an int, all if None, else these.
            return_prefix_tokens: Return pairs of map and tokens before it.
            norm: Apply the final norm to each.
            stop_early: Stop after the last block asked for.
            output_fmt: ``'NCHW'`` or ``'NLC'``.
            intermediates_only: Return the intermediates alone.

        Returns:
            The intermediates, or the final features (as `forward_features`) and them.

        Raises:
            AssertionError: output_fmt is another one.
        """
        assert output_fmt in ("NCHW", "NLC"), "output_fmt must be NCHW or NLC"
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        blocks = self.blocks[: max_index + 1] if stop_early else self.blocks
        x, height, width = self.embed(x)
        taken = []
        for i, block in enumerate(blocks):
            x = block(x, height, width)
            if i in take_indices:
                taken.append(self.norm(x) if norm else x)
        prefix = self.num_prefix_tokens
        intermediates = [y[:, prefix:] for y in taken]
        if output_fmt == "NCHW":
            intermediates = [
                y.unflatten(1, (height, width)).permute(0, 3, 1, 2).contiguous()
                for y in intermediates
            ]
        if return_prefix_tokens and prefix:
            intermediates = [(y, z[:, :prefix]) for y, z in zip(intermediates, taken, strict=True)]
        if intermediates_only:
            return intermediates
        if len(blocks) == len(self.blocks):
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the given blocks do not need.

        Args:
            indices: The last n blocks if an int, else these.
            prune_norm: Remove the final norm.
            prune_head: Remove the classifier and its pooling. A new classifier needs a pooling too:
                `reset_classifier(classes, global_pool=...)`.

        Returns:
            Indices of the blocks kept.
        """
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def embed(self, x: Tensor) -> tuple[Tensor, int, int]:
        """Images -> tokens [B, N, C] with their positions, height and width of the map.

        Raises:
            AssertionError: There is no batch axis, or another number of channels.
        """
        x = self.position(self.patch_embed(check_images(x, self.in_chans)))
        height, width = x.shape[1], x.shape[2]
        x = x.flatten(1, 2)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if self.pos_embed is not None:
            grid_size = self.patch_embed.grid_size
            x = self.add_positions(x, height, width, self.pos_embed, grid_size)
        return self.pos_drop(x), height, width

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> tokens [B, N, C] after the final norm.

        Raises:
            AssertionError: There is no batch axis, or another number of channels.
        """
        x, height, width = self.embed(x)
        for block in self.blocks:
            x = block(x, height, width)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens -> logits [B, num_classes], or the pooled features if pre_logits."""
        x = global_pool_nlc(x, pool_type=self.global_pool, num_prefix_tokens=self.num_prefix_tokens)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)
