"""The steps of a model, each from one map to the next: stem, blocks, downsampling, norm.

Whatever is built on one of the two skeletons of `vitlinear.models` has the steps of the skeleton.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import ClassifierHead, SelectAdaptivePool2d
from torch import Tensor, nn

from vitlinear.errors import UserError
from vitlinear.layers import check_images
from vitlinear.models._contract import TimmBackbone
from vitlinear.models._isotropic import IsotropicBackbone
from vitlinear.models._stages import StagedBackbone

from .reach import RowConv, Rows, check_layer, definer, row_convs, row_reach, rows_needed

# A band [1, rows, W, C] and the tokens before it, [1, P, C] -> the same of the next map.
Run = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


@dataclass
class Step:
    """From one map to the next.

    Attributes:
        name: Of the module in the model.
        modules: What it runs, by name.
        run: Runs it on a band.
        strided: Whether it changes the size of the map.
        level: Number of the map that `forward_intermediates` gives, if its output is one.
        convs: The convolutions of a strided step.
    """

    name: str
    modules: dict[str, nn.Module]
    run: Run
    strided: bool = False
    level: int | None = None
    convs: list[RowConv] = field(default_factory=list)

    def check(self, training: bool = False) -> None:
        """Check that all layers are known.

        Args:
            training: As `check_layer`.

        Raises:
            UserError: One is not, or cannot be split into bands; the message names it.
        """
        for name, module in self.modules.items():
            if self.strided:
                self.convs += row_convs(name, module, training)
            else:
                row_reach(name, module, 1, training)

    @property
    def stride(self) -> int:
        """Rows of the input for one of the output."""
        return math.prod(conv.stride for conv in self.convs)

    def reach(self, height: int) -> int:
        """Rows above and below that a step needs which keeps the size."""
        return sum(row_reach(name, module, height) for name, module in self.modules.items())

    def rows_needed(self, own: Rows, height: int) -> Rows:
        """Rows of the input for these rows of the output; height is that of the input."""
        if self.strided:
            return rows_needed(self.convs, own, height)
        reach = self.reach(height)
        return Rows(max(own.start - reach, 0), min(own.stop + reach, height))


def check_model(model: nn.Module) -> None:
    """Check that a model is one of a skeleton, and computes what the skeleton does.

    Raises:
        UserError: It is not.
    """
    if not isinstance(model, TimmBackbone):
        raise UserError(
            f"cannot split {type(model).__name__} into bands of rows: it is no model of vitlinear; "
            "give the model itself, without wrappers such as torch.compile"
        )
    skeleton: type[TimmBackbone]
    methods = ["forward", "forward_features", "forward_head", "forward_intermediates"]
    if isinstance(model, StagedBackbone):
        skeleton = StagedBackbone
    elif isinstance(model, IsotropicBackbone):
        skeleton = IsotropicBackbone
        methods.append("embed")
    else:
        raise UserError(
            f"cannot split {type(model).__name__} into bands of rows: it has a skeleton of its own"
        )
    for method in methods:
        if definer(model, method) not in skeleton.__mro__ or method in model.__dict__:
            raise UserError(
                f"cannot split {type(model).__name__} into bands of rows: it has a {method} of its "
                "own, whose steps are not known"
            )


def steps_of(model: nn.Module, training: bool = False) -> list[Step]:
    """The steps from the image to the features, each checked.

    Args:
        model: The model.
        training: Let it be in training mode.

    Raises:
        UserError: The model or one of its layers cannot run on bands of rows.
    """
    check_model(model)
    parts: Any = model
    staged = isinstance(model, StagedBackbone)
    steps = list(_staged(parts, training) if staged else _isotropic(parts))
    for step in steps:
        step.check(training)
    return steps


def _channels_first(module: nn.Module) -> Run:
    def run(x: Tensor, prefix: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), prefix

    return run


def _staged(model: Any, training: bool) -> Iterator[Step]:
    yield Step("stem", {"stem": model.stem}, _channels_first(model.stem), strided=True)
    for i, stage in enumerate(model.stages):
        path = f"stages.{i}"
        check_layer(path, stage, training=training)
        check_layer(path, stage, "shared", training)
        down, number = stage.downsample, len(stage.blocks)
        if type(down) is not nn.Identity:
            name = f"{path}.downsample"
            level = i if number == 0 else None
            yield Step(name, {name: down}, _channels_first(down), strided=True, level=level)
        others = {
            f"{path}.{name}": module
            for name, module in stage.named_children()
            if name not in ("downsample", "blocks")
        }
        for j, block in enumerate(stage.blocks):
            name = f"{path}.blocks.{j}"
            run = _staged_block(stage, block)
            level = i if j == number - 1 else None
            yield Step(name, {**others, name: block}, run, level=level)
    if type(model.final) is not nn.Identity:
        yield Step("final", {"final": model.final}, _channels_first(model.final))


def _staged_block(stage: Any, block: nn.Module) -> Run:
    def run(x: Tensor, prefix: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return block(x, *stage.shared(x.permute(0, 3, 1, 2))), prefix

    return run


def _isotropic(model: IsotropicBackbone) -> Iterator[Step]:
    def patches(x: Tensor, prefix: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return model.patch_embed(check_images(x.permute(0, 3, 1, 2), model.in_chans)), prefix

    yield Step("patch_embed", {"patch_embed": model.patch_embed}, patches, strided=True)
    if type(model.position) is not nn.Identity:
        position = model.position
        yield Step("position", {"position": position}, lambda x, prefix: (position(x), prefix))
    if model.cls_token is not None or model.pos_embed is not None:
        modules = {"add_positions": model.add_positions, "pos_drop": model.pos_drop}

        def tokens(x: Tensor, prefix: Tensor | None) -> tuple[Tensor, Tensor | None]:
            height, width = x.shape[1:3]
            x = x.flatten(1, 2)
            if model.cls_token is not None:
                x = torch.cat((model.cls_token, x), dim=1)
            if model.pos_embed is not None:
                grid_size = model.patch_embed.grid_size
                x = model.add_positions(x, height, width, model.pos_embed, grid_size)
            return _split(model.pos_drop(x), height, width)

        yield Step("pos_embed", modules, tokens)
    for i, block in enumerate(model.blocks):
        yield Step(f"blocks.{i}", {f"blocks.{i}": block}, _token_block(block), level=i)
    yield Step("norm", {"norm": model.norm}, _token_norm(model.norm))


def _join(x: Tensor, prefix: Tensor | None) -> Tensor:
    tokens = x.flatten(1, 2)
    return tokens if prefix is None else torch.cat((prefix, tokens), dim=1)


def _split(tokens: Tensor, height: int, width: int) -> tuple[Tensor, Tensor | None]:
    prefix = tokens.shape[1] - height * width
    before, x = tokens.tensor_split([prefix], dim=1)
    return x.unflatten(1, (height, width)), before if prefix else None


def _token_block(block: nn.Module) -> Run:
    def run(x: Tensor, prefix: Tensor | None) -> tuple[Tensor, Tensor | None]:
        height, width = x.shape[1:3]
        return _split(block(_join(x, prefix), height, width), height, width)

    return run


def _token_norm(norm: nn.Module) -> Run:
    def run(x: Tensor, prefix: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return norm(x), None if prefix is None else norm(prefix)

    return run


def check_head(model: Any, training: bool = False) -> None:
    """Check that the classifier is one of pooled features.

    Args:
        model: The model.
        training: As `check_layer`.

    Raises:
        UserError: It is not.
    """
    head = model.head
    if isinstance(model, IsotropicBackbone):
        check_layer("head", head, training=training)
        return
    pooled = type(head) is ClassifierHead and type(head.global_pool) is SelectAdaptivePool2d
    if not pooled:
        raise UserError(
            f"head ({type(head).__name__}) cannot run on bands of rows: only timm's ClassifierHead "
            "can; ask for features instead of logits"
        )
