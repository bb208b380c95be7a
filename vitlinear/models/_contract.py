"""The contract of timm for every model: what does not depend on how a model is built stands here.

`_stages.py` builds on it for pyramids of stages, `_isotropic.py` for rows of tokens.

No `from __future__ import annotations` in files of models: torch.fx copies the annotations of
`forward` into the code it generates, and TorchScript cannot read them there as strings.
"""

from collections.abc import Sequence
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from vitlinear.layers.fold import fuse_model
from vitlinear.layers.init_normal import init_normal_

POOLINGS = ("", "avg", "max", "avgmax")


class TimmBackbone(nn.Module):
    """A backbone with a classifier, as timm's registry, tests and tools expect one.

    Skeletons bring `forward_features`, `forward_head`, `forward_intermediates`,
    `prune_intermediate_layers`, `group_matcher`, `get_classifier`, and the two hooks
    `set_classifier` and `blocks_by_stage`.

    Attributes:
        feature_cfg: Class attribute: what ``features_only=True`` gives by default.
        rounds_down: Class attribute: whether maps leave incomplete patches at the end of a side
            out. Most models round up.
        default_convs: Class attribute: whether convolutions begin with PyTorch's own initial
            values, as some authors have it.
        feature_info: For each level its channels, reduction and module.
        num_features: Channels of what `forward_features` gives.
        head_hidden_size: Channels that the classifier takes.
    """

    feature_cfg = {"out_indices": (0, 1, 2, 3)}
    rounds_down = False
    default_convs = False

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        poolings: tuple[str, ...] = POOLINGS,
    ) -> None:
        """Check and keep what every family takes.

        Args:
            in_chans: Channels of the image.
            num_classes: Classes; 0 leaves the classifier out.
            global_pool: Pooling before the classifier.
            drop_rate: Dropout rate before the classifier.
            poolings: The poolings that the classifier has.

        Raises:
            ValueError: A number is too small.
            AssertionError: The pooling is not supported.
        """
        super().__init__()
        if in_chans < 1:
            raise ValueError(f"in_chans {in_chans} is too small")
        check_classes(num_classes)
        # Declared here, not in the class: TorchScript would take those for types of its own.
        self.feature_info: list[dict[str, Any]]
        self.num_features: int
        self.head_hidden_size: int
        self.poolings = poolings
        self.check_pool(global_pool)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate

    def check_pool(self, global_pool: str) -> None:
        """Raise `AssertionError` for a pooling that the classifier does not have."""
        # Raised, not asserted: python -O would let it pass. The type is what timm's contract asks.
        if global_pool not in self.poolings:
            names = ", ".join(map(repr, self.poolings))
            raise AssertionError(
                f"global_pool {global_pool!r} is not supported; choose from: {names}"
            )

    def set_features(self, module: str, dims: Sequence[int], reductions: Sequence[int]) -> None:
        """Note the levels that `forward_intermediates` gives.

        Args:
            module: Name of the list whose members put them out.
            dims: Channels of each.
            reductions: Pixels of the image in a row of each.
        """
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction, "module": f"{module}.{i}"}
            for i, (dim, reduction) in enumerate(zip(dims, reductions, strict=True))
        ]

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Set every parameter and buffer to its initial value, also after `to_empty()`.

        Truncated normal with deviation 0.02 for the weights of convolutions and linear layers, as
        in the released code; zero biases; all else as its module says. With `default_convs` that
        is said of linear layers and the classifier alone.

        Args:
            mode: Unused, part of timm's signature.
            needs_reset: Also reset modules that initialised themselves when they were made.
        """
        self.apply(partial(init_module, needs_reset=needs_reset, convs=not self.default_convs))
        if self.default_convs:
            self.get_classifier().apply(init_module)  # which may be a convolution itself

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beyond those of one axis, which timm leaves out: none."""
        return set()

    @torch.jit.ignore
    def fuse(self) -> "TimmBackbone":
        """Fold what inference does not need apart into its neighbours; see `fuse_model`."""
        fuse_model(self)
        return self

    @torch.jit.ignore
    def use_dense_form(self) -> None:
        """Give the maps that the authors' detectors and segmentors have, from now on.

        Some add zeros to odd maps there and not in the classifier: see `InvertedDownsample`. Sides
        that are multiples of 32 pixels see no difference. `MultiScaleBackbone` calls this.
        """
        for module in self.modules():
            if hasattr(module, "pads_odd_maps"):
                module.pads_odd_maps = True

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        raise NotImplementedError

    def blocks_by_stage(self) -> Sequence[Any]:
        """The blocks of each stage; every one is a `Block`."""
        raise NotImplementedError

    @torch.jit.ignore
    def set_grad_checkpointing(
        self, enable: bool = True, stages: Sequence[int] | None = None
    ) -> None:
        """Recompute every block during backward instead of keeping its activations.

        Args:
            enable: Whether to.
            stages: Indices of the stages to switch, the others staying as they are; None for all.
                The first ones have the most tokens, and keep the most for their share of the work.
                A model of one resolution is one stage, 0.

        Raises:
            ValueError: There is no such stage.
        """
        blocks = self.blocks_by_stage()
        number = len(blocks)
        chosen = range(number) if stages is None else stages
        for i in chosen:
            if i not in range(number):
                raise ValueError(f"no stage {i}: the model has stages 0 to {number - 1}")
        for i in chosen:
            for block in blocks[i]:
                block.grad_checkpointing = enable

    def set_classifier(self, num_classes: int, global_pool: str | None) -> None:
        """Make the classifier anew; the arguments have been checked."""
        raise NotImplementedError

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Classes; 0 leaves the classifier out.
            global_pool: New pooling; None keeps the present one.

        Raises:
            ValueError: num_classes is no number of classes.
            AssertionError: The pooling is not supported.
        """
        check_classes(num_classes)
        if global_pool is not None:
            self.check_pool(global_pool)
        self.set_classifier(num_classes, global_pool)
        self.num_classes = num_classes

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> logits [B, num_classes]."""
        x = self.forward_features(x)
        return self.forward_head(x)


def check_classes(number: int) -> None:
    """Raise `ValueError` for what is no number of classes; 0 stands for no classifier."""
    if not isinstance(number, Integral) or isinstance(number, bool) or number < 0:
        raise ValueError(f"num_classes must be a whole number, 0 or more, got {number!r}")


def init_module(module: nn.Module, needs_reset: bool = True, convs: bool = True) -> None:
    """Give one module its initial values; see `TimmBackbone.init_weights`.

    Args:
        module: The module; those inside it are not looked at.
        needs_reset: Also reset modules that initialised themselves when they were made.
        convs: Treat convolutions like linear layers.
    """
    if isinstance(module, nn.Linear) or (convs and isinstance(module, nn.Conv2d)):
        if not module.weight.is_meta:  # which would take most of the time to make a model there
            init_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif hasattr(module, "reset_parameters") and (
        # The parts of some got other values above, which their module gives back.
        needs_reset or getattr(module, "resets_parts", False)
    ):
        module.reset_parameters()
