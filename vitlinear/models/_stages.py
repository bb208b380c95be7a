"""What every backbone of four stages here has in common: timm's contract for feature hierarchies.

A family builds ``stem``, ``stages``, ``final`` and ``head`` in its constructor; everything that
timm asks of a model stands here. Maps between the parts are [B, C, H, W], channels-last in memory.

No `from __future__ import annotations` in files of models: torch.fx copies the annotations of
`forward` into the code it generates, and TorchScript cannot read them there as strings.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import get_device_dtype, trunc_normal_
from torch import Tensor, nn

from vitlinear._timm import feature_take_indices
from vitlinear.layers.fold import fuse_model

from ._build import imagenet_cfg
from ._gradient_checkpointing import check_stages, checkpoint

POOL_TYPES = ("", "avg", "max", "avgmax")


def map_cfg(side: int = 224, **kwargs: Any) -> dict[str, Any]:
    """A ``pretrained_cfg`` for square images of this side; see `imagenet_cfg`."""
    return imagenet_cfg(
        side, **{"pool_size": (side // 32, side // 32), "classifier": "head.fc", **kwargs}
    )


class BlockStage(nn.Module):
    """Downsampling, then blocks, on maps [B, C, H, W] that are channels-last in memory."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C, H', W']."""
        x = self.downsample(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return x.permute(0, 3, 1, 2)


class StagedBackbone(nn.Module):
    """Stem, four stages, what follows them, and a classifier; takes images of any size.

    Subclasses set, in their constructor:

    Attributes:
        stem: Images [B, in_chans, H, W] -> first map.
        stages: `nn.Sequential` of four modules, each with a flag ``grad_checkpointing`` and a
            list ``blocks``; downsampling comes first in a stage, so that the output of a stage is
            its feature map.
        final: Last map -> features of the classifier; a norm or a projection.
        head: A `timm.layers.ClassifierHead`.
        feature_info: For each stage its channels, reduction and module.
        num_features: Channels after `final`.
    """

    feature_cfg = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}

    def __init__(self, in_chans: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        """Check and keep what every family takes.

        Args:
            in_chans: Channels of the image.
            num_classes: Classes; 0 leaves the classifier out.
            global_pool: Pooling before the classifier.
            drop_rate: Dropout rate before the classifier.

        Raises:
            ValueError: A number is too small.
            AssertionError: The pooling is not supported.
        """
        super().__init__()
        if in_chans < 1 or num_classes < 0:
            raise ValueError(f"in_chans {in_chans} or num_classes {num_classes} is too small")
        check_pool(global_pool)
        # Declared here, not in the class: TorchScript would take those for types of its own.
        self.stem: nn.Module
        self.stages: nn.Sequential
        self.final: nn.Module
        self.head: nn.Module
        self.feature_info: list[dict[str, Any]]
        self.num_features: int
        self.head_hidden_size: int
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Set every parameter and buffer to its initial value, also after `to_empty()`.

        Truncated normal with deviation 0.02 for the weights of convolutions and linear layers, as
        in the released code; zero biases; all else as its module says.

        Args:
            mode: Unused, part of timm's signature.
            needs_reset: Also reset modules that initialised themselves when they were made.
        """
        self.apply(partial(init_module, needs_reset=needs_reset))

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
                (r"^final", (99999,)),
            ],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(
        self, enable: bool = True, stages: Sequence[int] | None = None
    ) -> None:
        """Recompute every block during backward instead of keeping its activations.

        Args:
            enable: Whether to.
            stages: Indices of the stages to switch, the others staying as they are; None for all.
                The first ones have the most tokens, and keep the most for their share of the work.

        Raises:
            ValueError: There is no such stage.
        """
        for i in check_stages(stages, len(self.stages)):
            self.stages[i].grad_checkpointing = enable

    @torch.jit.ignore
    def fuse(self) -> "StagedBackbone":
        """Fold what inference does not need apart into its neighbours; see `fuse_model`."""
        fuse_model(self)
        return self

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
            check_pool(global_pool)
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
            x = self.final(x)
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
            prune_norm: Remove what stands between the last stage and the head.
            prune_head: Remove the classifier, and with it what only the classifier uses.

        Returns:
            Indices of the stages kept.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        truncated = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_norm or prune_head or truncated:
            # The head is sized for the projected features: without them it cannot stay.
            self.final = nn.Identity()
            width = self.feature_info[max_index]["num_chs"]
            self.num_features = self.head_hidden_size = width
            self.num_classes = 0
            self.head.reset(0, in_features=width, **get_device_dtype(self))
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> features [B, num_features, ceil(H/32), ceil(W/32)].

        Raises:
            AssertionError: The images have another number of channels.
        """
        x = self.stem(x)
        x = self.stages(x)
        return self.final(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features -> logits [B, num_classes], or the pooled features if pre_logits."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> logits [B, num_classes]."""
        x = self.forward_features(x)
        return self.forward_head(x)


def four_each(**settings: Sequence[Any]) -> None:
    """Check that per-stage settings have four entries.

    Raises:
        ValueError: One does not; the message shows it.
    """
    for name, setting in settings.items():
        if isinstance(setting, str) or not isinstance(setting, Sequence) or len(setting) != 4:
            raise ValueError(f"{name} must have four entries, one for each stage; got {setting!r}")


def check_pool(global_pool: str) -> None:
    """Raise `AssertionError` for a pooling that the classifier does not have."""
    # Raised, not asserted: python -O would let it pass. The type is what timm's contract asks for.
    if global_pool not in POOL_TYPES:
        names = ", ".join(map(repr, POOL_TYPES))
        raise AssertionError(f"global_pool {global_pool!r} is not supported; choose from: {names}")


def init_module(module: nn.Module, needs_reset: bool = True) -> None:
    """Give one module its initial values; see `StagedBackbone.init_weights`."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif needs_reset and hasattr(module, "reset_parameters"):
        module.reset_parameters()
