"""The four-stage pyramid that RALA, MALA and NaLaFormer share.

A convolutional stem, four stages of attention blocks with a strided convolution between them, a
1x1 convolution to the width of the head, and a linear classifier. A family brings the attention of
its blocks and a table of variants; see `vitlinear/models/ravlt.py`.

No `from __future__ import annotations` in files of models: torch.fx copies the annotations of
`forward` into the code it generates, and TorchScript cannot read them there as strings.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import (
    ClassifierHead,
    ConvNormAct,
    DropPath,
    LayerNorm,
    LayerScale,
    calculate_drop_path_rates,
    get_device_dtype,
    trunc_normal_,
)
from timm.models import checkpoint
from torch import Tensor, nn

from .._timm import feature_take_indices, register_notrace_function
from ..layers import ConvMlp, ConvStem, DepthwiseConv, GatedAttention
from ..ops import RotaryTables, accumulation_dtype, rotary_tables

POOL_TYPES = ("", "avg", "max", "avgmax")


@register_notrace_function
def stage_rotary_tables(x: Tensor, head_dim: int) -> RotaryTables:
    """Rotary tables for a map [B, C, H, W]; one traced step, whatever the size of the map."""
    dtype = accumulation_dtype(x.dtype)
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
        self.pos = DepthwiseConv(dim, 3, **dd)
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
        x = x + self.pos(x)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), rotary)))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


class PyramidStage(nn.Module):
    """Downsampling, then blocks, on maps [B, C, H, W] that are channels-last in memory."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        drop_paths: Sequence[float],
        num_heads: int,
        downsample: bool,
        block_layer: type[PyramidBlock],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **block_args: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.downsample = (
            ConvNormAct(in_dim, dim, 3, stride=2, padding=1, bias=True, apply_act=False, **dd)
            if downsample
            else nn.Identity()
        )
        self.blocks = nn.ModuleList(
            block_layer(dim, num_heads, drop_path=rate, **block_args, **dd) for rate in drop_paths
        )
        self.head_dim = dim // num_heads

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C, H', W']."""
        x = self.downsample(x)
        rotary = stage_rotary_tables(x, self.head_dim)
        x = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, rotary)
            else:
                x = block(x, rotary)
        return x.permute(0, 3, 1, 2)


class LinearPyramid(nn.Module):
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
        super().__init__()
        per_stage = (embed_dims, depths, num_heads, mlp_ratios, attn_types, ls_init_values)
        if any(isinstance(setting, str) or len(setting) != 4 for setting in per_stage):
            raise ValueError(
                "embed_dims, depths, num_heads, mlp_ratios, attn_types and ls_init_values must "
                f"have four entries, one for each stage; got {', '.join(map(str, per_stage))}"
            )
        if in_chans < 1 or num_classes < 0:
            raise ValueError(f"in_chans {in_chans} or num_classes {num_classes} is too small")
        _check_pool(global_pool)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate

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
        self.final_conv = ConvNormAct(
            embed_dims[-1], head_width, 1, bias=True, act_layer=nn.SiLU, **dd
        )
        self.num_features = self.head_hidden_size = head_width
        # A 1x1 convolution, as released: without pooling it gives a map of logits.
        self.head = ClassifierHead(
            head_width, num_classes, global_pool, drop_rate, use_conv=True, **dd
        )
        self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Set every parameter and buffer to its initial value, also after `to_empty()`.

        Truncated normal with deviation 0.02 for the weights of convolutions and linear layers, as
        in the released code; zero biases; norms and layer-scale as their modules say.

        Args:
            mode: Unused, part of timm's signature.
            needs_reset: Also reset modules that initialised themselves when they were made.
        """
        self.apply(partial(_init_weights, needs_reset=needs_reset))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beyond the usual one-dimensional ones: none.

        The released training scripts decay the layer-scales, whose four axes hide them from that
        rule; here they have one axis and timm's rule exempts them.
        """
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters into layers, for layer-wise decay."""
        if coarse:
            return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}
        return {
            "stem": r"^stem",
            "blocks": [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^final_conv", (99999,)),
            ],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block during backward instead of keeping its activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Classes; 0 leaves the classifier out.
            global_pool: New pooling; None keeps the present one.

        Raises:
            AssertionError: The pooling is not supported.
        """
        if global_pool is not None:
            _check_pool(global_pool)
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Forward pass that also returns the maps of the stages.

        Args:
            x: Images, [B, in_chans, H, W].
            indices: The last n stages if an int, all if None, else these.
            norm: Unused: stage maps have no norm of their own.
            stop_early: Stop after the last stage asked for.
            output_fmt: ``'NCHW'``, the only one.
            intermediates_only: Return the maps alone.

        Returns:
            The maps, or the final features (as `forward_features`) and the maps.

        Raises:
            AssertionError: output_fmt is another one.
        """
        assert output_fmt == "NCHW", "output_fmt must be NCHW"
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: max_index + 1] if stop_early else self.stages
        intermediates = []
        x = self.stem(x)
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        if len(stages) == len(self.stages):
            x = self.final_conv(x)
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the given stages do not need.

        Args:
            indices: The last n stages if an int, else these.
            prune_norm: Remove the convolution and norm between the last stage and the head.
            prune_head: Remove the classifier, and with it what only the classifier uses.

        Returns:
            Indices of the stages kept.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        truncated = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_norm or prune_head or truncated:
            # The head is sized for the projected features: without them it cannot stay.
            self.final_conv = nn.Identity()
            width = self.feature_info[max_index]["num_chs"]
            self.num_features = self.head_hidden_size = width
            self.num_classes = 0
            self.head.reset(0, in_features=width, **get_device_dtype(self))
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> features [B, head_width, ceil(H/32), ceil(W/32)].

        Raises:
            AssertionError: The images have another number of channels.
        """
        x = self.stem(x)
        x = self.stages(x)
        return self.final_conv(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features -> logits [B, num_classes], or the pooled features if pre_logits."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> logits [B, num_classes]."""
        x = self.forward_features(x)
        return self.forward_head(x)


def _check_pool(global_pool: str) -> None:
    # Raised, not asserted: python -O would let it pass. The type is what timm's contract asks for.
    if global_pool not in POOL_TYPES:
        names = ", ".join(map(repr, POOL_TYPES))
        raise AssertionError(f"global_pool {global_pool!r} is not supported; choose from: {names}")


def _init_weights(module: nn.Module, needs_reset: bool = True) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif needs_reset and hasattr(module, "reset_parameters"):
        module.reset_parameters()
