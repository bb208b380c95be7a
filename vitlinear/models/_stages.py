"""The skeleton of backbones of four stages, with timm's contract for feature hierarchies.

A family makes ``stem``, stages, ``final`` and head in its constructor, in this order; see
`vitlinear/models/l2vit.py`. Maps between the parts are [B, C, H, W], channels-last in memory.

No `from __future__ import annotations` in files of models: torch.fx copies the annotations of
`forward` into the code it generates, and TorchScript cannot read them there as strings.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates, get_device_dtype
from torch import Tensor, nn

from vitlinear._timm import feature_take_indices
from vitlinear.layers import known_layout
from vitlinear.layers.band import LOCAL
from vitlinear.ops import RotaryTables

from ._build import imagenet_cfg
from ._contract import TimmBackbone
from ._gradient_checkpointing import Block


def map_cfg(side: int = 224, **kwargs: Any) -> dict[str, Any]:
    """A ``pretrained_cfg`` for square images of this side; see `imagenet_cfg`."""
    return imagenet_cfg(
        side, **{"pool_size": (side // 32, side // 32), "classifier": "head.fc", **kwargs}
    )


class Stage(nn.Module):
    """Downsampling, then blocks, on maps [B, C, H, W] that are channels-last in memory."""

    row_rule = LOCAL

    def __init__(self, downsample: nn.Module, blocks: Sequence[Block]) -> None:
        """Put the stage together.

        Args:
            downsample: Takes and gives a map [B, C, H, W].
            blocks: Take and give a map [B, H, W, C], and take what `shared` makes.
        """
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def shared(self, x: Tensor) -> tuple[()]:
        """Further arguments of all blocks, made once from the map [B, C, H, W]: none."""
        return ()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C, H', W']."""
        x = self.downsample(x)
        shared = self.shared(x)
        x = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x, *shared)
        return known_layout(x.permute(0, 3, 1, 2))


class RotaryStage(Stage):
    """A stage whose blocks share the rotary tables of its map."""

    row_rule = LOCAL

    def __init__(self, downsample: nn.Module, blocks: Sequence[Block], rotary: nn.Module) -> None:
        """Put the stage together.

        Args:
            downsample: As `Stage`.
            blocks: Take a map [B, H, W, C] and rotary tables.
            rotary: Takes a map [B, C, H, W] and gives the tables.
        """
        super().__init__(downsample, blocks)
        self.rotary = rotary

    def shared(self, x: Tensor) -> tuple[RotaryTables]:
        """The tables of a map [B, C, H, W]."""
        return (self.rotary(x),)


class StagedBackbone(TimmBackbone):
    """Stem, four stages, what follows them, and a classifier; takes images of any size.

    Subclasses set, in their constructor and in this order:

    Attributes:
        stem: Images [B, in_chans, H, W] -> first map.
        stages: By `make_stages`. Downsampling comes first in a stage, so that what a stage puts
            out is its feature map.
        final: Last map -> features of the classifier; a norm or a projection.
        head: By `make_head`.
    """

    feature_cfg = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}

    def __init__(self, in_chans: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        """Check and keep what every family takes; arguments as `TimmBackbone`."""
        super().__init__(in_chans, num_classes, global_pool, drop_rate)
        # Declared here, not in the class: TorchScript would take those for types of its own.
        self.stem: nn.Module
        self.stages: nn.Sequential
        self.final: nn.Module
        self.head: nn.Module

    def make_stages(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        drop_path_rate: float,
        downsample: Callable[[int], nn.Module],
        block: Callable[[int, int, float], Block],
        stage: Callable[[int, nn.Module, list[Block]], Stage] | None = None,
    ) -> None:
        """Set `stages`, and the levels that they give.

        Args:
            dims: Channels of each stage.
            depths: Blocks of each stage.
            drop_path_rate: Stochastic depth rate of the last block, growing linearly from 0.
            downsample: What stands before the blocks of stage i > 0; takes i.
            block: A block; takes the stage i, the place j in it, and its stochastic depth rate.
            stage: Puts stage i together from its downsampling and its blocks; `Stage` by default.
        """
        if min(depths) < 0:
            raise ValueError(f"depths must be 0 or more, got {tuple(depths)}")
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.stages = nn.Sequential()
        for i, depth in enumerate(depths):
            down = nn.Identity() if i == 0 else downsample(i)
            blocks = [block(i, j, next(rates)) for j in range(depth)]
            self.stages.append(stage(i, down, blocks) if stage else Stage(down, blocks))
        self.set_features("stages", dims, [4 * 2**i for i in range(len(dims))])

    def make_head(self, width: int, global_pool: str, **dd: Any) -> None:
        """Set the classifier for features of this width; the last step of a constructor."""
        if width < 1:
            raise ValueError(f"the classifier takes at least one channel, got {width}")
        self.num_features = self.head_hidden_size = width
        # A 1x1 convolution, as released: without pooling it gives a map of logits.
        self.head = ClassifierHead(
            width, self.num_classes, global_pool, self.drop_rate, use_conv=True, **dd
        )
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def projects(self) -> bool:
        """Whether `final` is a projection to another width, not a norm."""
        return self.num_features != self.feature_info[-1]["num_chs"]

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

    def blocks_by_stage(self) -> Sequence[Any]:
        """The blocks of the stages."""
        return [stage.blocks for stage in self.stages]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head.fc

    def set_classifier(self, num_classes: int, global_pool: str | None) -> None:
        """Make the classifier anew."""
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
            norm: Apply the final norm to the map of the last stage; a projection is none.
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
                final = norm and i == len(self.stages) - 1 and not self.projects()
                intermediates.append(self.final(x) if final else x)
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
            prune_head: Remove the classifier and its pooling, and what only the classifier uses. A
                new classifier needs a pooling too: `reset_classifier(classes, global_pool=...)`.

        Returns:
            Indices of the stages kept.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        truncated = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        # The head is sized for projected features: neither stays without the other.
        without_final = prune_norm or truncated or (prune_head and self.projects())
        if prune_head or truncated or (prune_norm and self.projects()):
            width = self.feature_info[max_index]["num_chs"] if without_final else self.num_features
            self.num_features = self.head_hidden_size = width
            self.num_classes = 0
            pooling = "" if prune_head else None  # the present one
            self.head.reset(0, pooling, in_features=width, **get_device_dtype(self))
        if without_final:
            self.final = nn.Identity()
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
        return self.head(known_layout(x), pre_logits=pre_logits)


def four_each(**settings: Sequence[Any]) -> None:
    """Check that per-stage settings have four entries.

    Raises:
        ValueError: One does not; the message shows it.
    """
    for name, setting in settings.items():
        if isinstance(setting, str) or not isinstance(setting, Sequence) or len(setting) != 4:
            raise ValueError(f"{name} must have four entries, one for each stage; got {setting!r}")
