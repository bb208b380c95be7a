"""What backbones of one resolution share: patches, blocks on a row of tokens, timm's contract.

A family brings its blocks, and sets ``blocks`` and ``norm`` in its constructor; see
`vitlinear/models/linear_deit.py`. Tokens are [B, N, C]; those of the map stand last, row by row.

No `from __future__ import annotations` in files of models: torch.fx copies the annotations of
`forward` into the code it generates, and TorchScript cannot read them there as strings.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import (
    DropPath,
    LayerNorm,
    PatchEmbed,
    calculate_drop_path_rates,
    get_device_dtype,
    global_pool_nlc,
    resample_abs_pos_embed,
    trunc_normal_,
)
from torch import Tensor, nn

from vitlinear._timm import feature_take_indices, register_notrace_module, update_model_input_size
from vitlinear.layers import Mlp, check_images
from vitlinear.layers.fold import fuse_model
from vitlinear.layers.windows import join_maps

from ._build import imagenet_cfg
from ._gradient_checkpointing import check_stages, checkpoint
from ._stages import init_module


def token_cfg(side: int = 224, **kwargs: Any) -> dict[str, Any]:
    """A ``pretrained_cfg`` for square images of this side; see `imagenet_cfg`."""
    return imagenet_cfg(side, first_conv="patch_embed.proj", classifier="head", **kwargs)


class TokenBlock(nn.Module):
    """Attention and feed-forward network, each after a norm and with its residual."""

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


# One step to torch.fx, which cannot follow choices that look at shapes.
@register_notrace_module
class AddPositions(nn.Module):
    """Adds learned positions, which belong to the model, to tokens; resizes them to the map."""

    def __init__(self, num_prefix_tokens: int) -> None:
        """Note how many tokens stand before those of the map; they have positions too."""
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens

    def forward(
        self,
        x: Tensor,
        pos_embed: Tensor,
        grid_size: tuple[int, int],
        height: int,
        width: int,
        valid_sizes: list[tuple[int, int]] | None = None,
    ) -> Tensor:
        """Add.

        Args:
            x: Tokens, [B, num_prefix_tokens + height * width, C].
            pos_embed: Positions, [1, num_prefix_tokens + rows * columns, C].
            grid_size: Rows and columns of the positions.
            height: Of the map.
            width: Of the map.
            valid_sizes: Height and width of the part of each map that is no padding: positions
                are resized to it.

        Returns:
            In the shape of x.
        """
        if valid_sizes is None:
            return x + self.resized(pos_embed, grid_size, height, width)
        prefix = self.num_prefix_tokens
        maps: list[Tensor] = []
        for rows, cols in valid_sizes:
            positions = self.resized(pos_embed, grid_size, rows, cols)[:, prefix:]
            maps.append(positions.unflatten(1, [rows, cols]))
        before = pos_embed[:, :prefix].expand(x.shape[0], -1, -1)
        return x + torch.cat((before, join_maps(maps, height, width).flatten(1, 2)), dim=1)

    def resized(
        self, pos_embed: Tensor, grid_size: tuple[int, int], height: int, width: int
    ) -> Tensor:
        """The positions of a map of this size, [1, num_prefix_tokens + height * width, C]."""
        return resample_abs_pos_embed(
            pos_embed,
            new_size=[height, width],
            old_size=[grid_size[0], grid_size[1]],
            num_prefix_tokens=self.num_prefix_tokens,
        )


class IsotropicBackbone(nn.Module):
    """Patches, blocks, norm and classifier; takes images of any size, square or not.

    Images are padded with zeros to whole patches, to the right and below. Learned positions are
    resized to the grid of the image; at the size that they were learned at they are added as they
    are.

    Attributes:
        position: What positions a map [B, H, W, C] gets before its tokens are laid in a row;
            nothing unless a subclass sets it.
        blocks: `nn.ModuleList` of modules called as `TokenBlock`; set by subclasses.
        norm: Norm after the last block; set by subclasses.
        feature_info: For each block its channels, reduction and module.
        num_features: Channels.
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
        """Make all but blocks and norm.

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
        super().__init__()
        if in_chans < 1 or num_classes < 0:
            raise ValueError(f"in_chans {in_chans} or num_classes {num_classes} is too small")
        if depth < 1:
            raise ValueError(f"the model needs at least one block, got depth {depth}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1 if class_token else 0
        self.check_pool(global_pool)
        self.global_pool = global_pool
        self.grad_checkpointing = False
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"}
            for i in range(depth)
        ]

        self.patch_embed = PatchEmbed(
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
        self.add_positions = AddPositions(self.num_prefix_tokens)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.blocks: nn.ModuleList
        self.norm: nn.Module
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self.make_head(num_classes, **dd)

    def check_pool(self, global_pool: str) -> None:
        """Raise `AssertionError` for a pooling that the classifier does not have."""
        # Raised, not asserted: python -O would let it pass. The type is what timm's contract asks.
        poolings = ("", "avg", "max", "avgmax", *(("token",) if self.num_prefix_tokens else ()))
        if global_pool not in poolings:
            names = ", ".join(map(repr, poolings))
            raise AssertionError(
                f"global_pool {global_pool!r} is not supported; choose from: {names}"
            )

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
        """Set every parameter and buffer to its initial value, also after `to_empty()`.

        Truncated normal with deviation 0.02 for the weights of convolutions and linear layers, the
        class token and the positions; zero biases; all else as its module says.

        Args:
            mode: Unused, part of timm's signature.
            needs_reset: Also reset modules that initialised themselves when they were made.
        """
        self.apply(partial(init_module, needs_reset=needs_reset))
        for parameter in (self.cls_token, self.pos_embed):
            if parameter is not None:
                trunc_normal_(parameter, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beyond the usual one-dimensional ones."""
        return {name for name in ("pos_embed", "cls_token") if getattr(self, name) is not None}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters into layers, for layer-wise decay."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed|^position",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(
        self, enable: bool = True, stages: Sequence[int] | None = None
    ) -> None:
        """Recompute every block during backward instead of keeping its activations.

        Args:
            enable: Whether to.
            stages: As for pyramids. This model is one stage, 0.

        Raises:
            ValueError: There is no such stage.
        """
        if check_stages(stages, 1):
            self.grad_checkpointing = enable

    @torch.jit.ignore
    def fuse(self) -> "IsotropicBackbone":
        """Fold what inference does not need apart into its neighbours; see `fuse_model`."""
        fuse_model(self)
        return self

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Classes; 0 leaves the classifier out.
            global_pool: New pooling; None keeps the present one.

        Raises:
            AssertionError: The pooling is not supported.
        """
        if global_pool is not None:
            self.check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
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
            if self.grad_checkpointing:
                x = checkpoint(block, x, height, width)
            else:
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
            prune_head: Remove the classifier.

        Returns:
            Indices of the blocks kept.
        """
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
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
            x = self.add_positions(x, self.pos_embed, grid_size, height, width)
        return self.pos_drop(x), height, width

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> tokens [B, N, C] after the final norm.

        Raises:
            AssertionError: There is no batch axis, or another number of channels.
        """
        x, height, width = self.embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, height, width)
            else:
                x = block(x, height, width)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens -> logits [B, num_classes], or the pooled features if pre_logits."""
        x = global_pool_nlc(x, pool_type=self.global_pool, num_prefix_tokens=self.num_prefix_tokens)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> logits [B, num_classes]."""
        x = self.forward_features(x)
        return self.forward_head(x)


class DeiT(IsotropicBackbone):
    """The layout of DeiT (arXiv:2012.12877), for an attention that a family brings."""

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
        norm_layer = partial(LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            TokenBlock(
                embed_dim,
                attn_layer(
                    embed_dim, num_heads, proj_drop=proj_drop_rate, backend=attn_backend, **dd
                ),
                Mlp(embed_dim, int(embed_dim * mlp_ratio), drop=proj_drop_rate, **dd),
                norm_layer,
                rate,
                **dd,
            )
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        )
        self.norm = norm_layer(embed_dim, **dd)
        self.init_weights(needs_reset=False)

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
                resized = resample_abs_pos_embed(
                    self.pos_embed,
                    new_size=list(self.patch_embed.grid_size),
                    old_size=list(old_grid),
                    num_prefix_tokens=self.num_prefix_tokens,
                )
            self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        update_model_input_size(self, self.patch_embed.img_size)
