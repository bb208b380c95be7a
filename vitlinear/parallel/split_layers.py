"""Layers of a parallelised model: classes in the place of those that rows reach.

Parameters, buffers and their names stay. An instance gets a subclass of its own class, as
``fully_shard`` does it too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import global_pool_nlc
from torch import Tensor, nn

from vitlinear.layers.band import band_in_use, use_band
from vitlinear.layers.recompute import TakesRows, can_recompute, recomputing
from vitlinear.models._valid_region import valid_region
from vitlinear.ops import accumulation_dtype
from vitlinear.rows.reach import Rows

from .agreement import check_agreement, model_facts
from .levels import Level, Plan
from .shards import ImageRows, rows_here

_CLASSES: dict[tuple[type, type], Any] = {}


def _split_class(mixin: type, base: type) -> Any:
    """The class made of the two; one for all modules."""
    if (mixin, base) not in _CLASSES:
        made: Any = type(f"Split{base.__name__}", (mixin, base), {"__module__": __name__})
        made.__doc__ = f"A `{base.__name__}` of a parallelised model."
        _CLASSES[mixin, base] = made
    return _CLASSES[mixin, base]


class SplitLayer(nn.Module):
    """Base of the classes.

    Attributes:
        split_name: Of the layer in its model, for messages.
    """

    split_name: str

    def __reduce__(self) -> Any:
        """Pickle as the mixin and the class that it was made for."""
        mixin, base = type(self).__bases__
        return _remake, (mixin, base), self.__dict__


def _remake(mixin: type, base: type) -> Any:
    made = _split_class(mixin, base)
    return made.__new__(made)


def split(module: nn.Module, mixin: type[SplitLayer], name: str, **settings: Any) -> None:
    """Give a module the class made of a mixin and its own, and attributes."""
    module.__class__ = _split_class(mixin, type(module))
    settings["split_name"] = name
    for key, value in settings.items():
        setattr(module, key, value)


class Placed(SplitLayer):
    """Runs under the band of its map: blocks, norms, positions, rotary tables.

    Attributes:
        plan: Of the model.
        level: How many of them lie before it.
        prefix: Tokens before those of its map.
    """

    plan: Plan
    level: int
    prefix: int

    def forward(self, *args: Any) -> Any:
        """As the layer, under the band."""
        rows = rows_here(self.split_name)
        with use_band(rows.band(self.plan, self.level, self.prefix)):
            return super().forward(*args)


class PlacedStrided(SplitLayer):
    """A layer from one map [B, C, rows, W] to a smaller one.

    Attributes:
        plan: Of the model.
        level: How many of them lie before it.
        after: How many of them lie before its output.
        moves: Rows move first, so that nothing of it looks at those of others, or where it adds
            zeros below.
        axis_after: Of the rows in its output.
        structure: Of the first one of a model: a text that tells it from others.
        agreed: Whether the weights have been compared with those of other processes.
    """

    plan: Plan
    level: int
    after: int
    moves: bool
    axis_after: int
    structure: str
    agreed: bool = False

    def check_others(self, x: Tensor, rows: ImageRows) -> None:
        """Check that the other processes run the same model in the same way on such rows.

        Raises:
            UserError: In all of them; one does not.
        """
        facts = {
            **model_facts(self.structure, self, x, weights=not self.agreed),
            "the rows of each process": (
                [tuple(own) for own in rows.cuts],
                "give the same height, sizes and multiple in each",
            ),
        }
        check_agreement(facts, rows.process_group, x.device)
        self.agreed = True

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        rows = rows_here(self.split_name)
        # First: what follows may refuse the rows of one process alone, and the others would wait.
        if self.level == 0 and not torch.compiler.is_compiling():
            self.check_others(x, rows)
        before, after = (rows.band(self.plan, i) for i in (self.level, self.after))
        if self.level == 0:
            check_shard(x, rows)
        before.check_rows(x.shape[2])
        if self.moves:
            need = self.plan.layers[self.level].aligned(before.level)
            x = fetch_rows(rows, x, before.level, need)
        # Convolutions have levels of their own; positions ask for that of the output.
        with use_band(after):
            x = super().forward(x)
        after.check_rows(x.shape[self.axis_after])
        return x


def fetch_rows(rows: ImageRows, x: Tensor, level: Level, need: tuple[Rows, ...]) -> Tensor:
    """Rows of a map [B, C, rows, W], which stays channels-last in memory."""
    return rows.fetch(x.permute(0, 2, 3, 1), 1, level.cuts, need).permute(0, 3, 1, 2)


def check_shard(x: Tensor, rows: ImageRows) -> None:
    """Check what a model is given.

    Raises:
        ValueError: It is not the rows of this process, or a batch is padded.
    """
    own = rows.own
    if x.dim() == 4 and x.shape[2] != own.stop - own.start:
        raise ValueError(
            f"a parallelised model takes the rows of its process: {own.stop - own.start} of the "
            f"{rows.height} of these images, got {x.shape[2]}"
        )
    if valid_region() is not None:
        raise ValueError(
            "padded batches cannot be split into rows: give images of one size, without padding"
        )


def run_on(layer: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> Tensor:
    """A layer on maps [B, rows, W, C], one above the other.

    Backward keeps the maps, which other layers often keep too, and puts them together again.
    """

    def together(*parts: Tensor) -> Tensor:
        return torch.cat(parts, 1)

    if len(parts) == 1:
        return layer(parts[0])
    x = together(*parts)
    if not can_recompute(x):
        return layer(x)
    with recomputing(x, together, *parts):
        return layer(x)


class StridedConv(SplitLayer):
    """A convolution of a stem or a downsampling, [B, C, rows, W], which knows its level.

    Attributes:
        plan: Of the model.
        level: How many of them lie before it.
        reach: Rows of its input from the first that it takes to the last, stride, zeros above.
    """

    plan: Plan
    level: int
    reach: tuple[int, int, int]

    def forward(self, x: Tensor) -> Tensor:
        """As the layer; rows of others are fetched, and the results near them are dropped."""
        rows = rows_here(self.split_name)
        kernel, stride, padding = self.reach
        before = rows.band(self.plan, self.level).level
        after = before if stride == 1 else rows.band(self.plan, self.level + 1).level
        need = []
        for start, stop in after.cuts:
            first = (start * stride - padding) // stride * stride
            last = (stop - 1) * stride - padding + kernel
            need.append(Rows(max(first, 0), max(min(last, before.height), 0)))
        own = after.cuts[rows.rank]
        parts = rows.fetch_parts(x.permute(0, 2, 3, 1), 1, before.cuts, tuple(need))
        x = run_on(self.on_rows, parts)
        return x.narrow(2, own.start - need[rows.rank].start // stride, own.stop - own.start)

    def on_rows(self, x: Tensor) -> Tensor:
        """The layer on any map [B, rows, W, C]."""
        y: Tensor = super().forward(x.permute(0, 3, 1, 2))
        return y


class MapConv(SplitLayer, TakesRows):
    """A convolution in a block, which keeps the size; in windows it sees them whole.

    For backward it keeps its input, which others often keep too, and the rows of other processes,
    but not the map made of both.

    Attributes:
        axis: Of the rows in its input.
        padding_rows: Rows above and below that it looks at.
    """

    axis: int
    padding_rows: int

    def forward(self, x: Tensor, taken: list[Tensor] | None = None) -> Tensor:
        """As the layer.

        Args:
            x: Its input.
            taken: As `TakesRows` says.
        """
        if self.axis == 2:
            return self.convolved(x.permute(0, 2, 3, 1), taken).permute(0, 3, 1, 2)
        return self.convolved(x, taken)

    def convolved(self, x: Tensor, taken: list[Tensor] | None) -> Tensor:
        """[B, rows, W, C] -> as `forward`."""
        above, below = taken or self.taken(x)
        if taken is not None and not taken:
            taken += [above, below]
        if not above.shape[1] + below.shape[1]:
            return self.on_rows(x)
        y = run_on(self.on_rows, (above, x, below))
        # Else the next layer would copy it, and both were kept.
        return y.narrow(1, above.shape[1], x.shape[1]).contiguous()

    def taken(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of other processes above and below."""
        band: Any = band_in_use()
        if band is None:
            none = x.new_empty(x.shape[0], 0, *x.shape[2:])
            return none, none
        above, below = band.beside(x, self.padding_rows)
        return above, below

    def on_rows(self, x: Tensor) -> Tensor:
        """The layer on any map [B, rows, W, C]."""
        if self.axis == 2:
            y: Tensor = super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return y
        y = super().forward(x)
        return y


class SplitBatchNorm(SplitLayer):
    """A batch norm whose statistics are those of whole images."""

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        rows = rows_here(self.split_name)
        norm: Any = self
        if not (norm.training or norm.running_mean is None):
            return super().forward(x)
        if x.dim() == 2:  # pooled features, of whole images in every process
            return super().forward(x)
        dims = [i for i in range(x.dim()) if i != 1]
        shape = [-1 if i == 1 else 1 for i in range(x.dim())]
        values = x.to(accumulation_dtype(x.dtype))
        own = values.new_full((1,), x.numel() // x.shape[1])
        sums, count = rows.total(values.sum(dims), own)
        mean = sums / count
        centred = values - mean.reshape(shape)
        (squares,) = rows.total(centred.square().sum(dims))
        var = squares / count
        if norm.training and norm.running_mean is not None:
            self.count_statistics(mean.detach(), (squares / (count - 1)).detach())
        scale = (var + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        y = centred * scale.reshape(shape)
        if norm.bias is not None:
            y = y + norm.bias.reshape(shape)
        return y.to(x.dtype)

    @torch.no_grad()
    def count_statistics(self, mean: Tensor, var: Tensor) -> None:
        """Move the running averages."""
        norm: Any = self
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            weight = 1.0 / norm.num_batches_tracked.to(mean.dtype)
            for average, value in ((norm.running_mean, mean), (norm.running_var, var)):
                average.add_((value - average) * weight)
        else:
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            norm.running_var.lerp_(var.to(norm.running_var.dtype), norm.momentum)


class SplitDropPath(SplitLayer):
    """Stochastic depth of whole samples: the first process draws for all."""

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        path: Any = self
        if path.drop_prob == 0.0 or not path.training:
            return x
        return x * drawn(super().forward, x.new_ones(x.shape[0], *[1] * (x.dim() - 1)), self)


class SplitDropout(SplitLayer):
    """Dropout of pooled features, which are the same on all processes: the first draws for all."""

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        dropout: Any = self
        if dropout.p == 0.0 or not dropout.training:
            return x
        return x * drawn(super().forward, torch.ones_like(x), self)


@torch.no_grad()
def drawn(draw: Any, ones: Tensor, layer: SplitLayer) -> Tensor:
    """Draw on the first process, for all."""
    rows = rows_here(layer.split_name)
    mask = draw(ones)
    (mask,) = rows.total(mask if rows.rank == 0 else torch.zeros_like(mask))
    return mask


def pooled(rows: ImageRows, x: Tensor, dims: list[int], kind: str) -> Tensor:
    """Mean, maximum, or mean of both, over places of the whole map.

    Args:
        rows: Of the image.
        x: Values of the own rows.
        dims: Axes of the places.
        kind: ``avg``, ``max`` or ``avgmax``.
    """
    found = []
    if kind != "max":
        sums = x.to(accumulation_dtype(x.dtype)).sum(dims)
        sums, count = rows.total(sums, sums.new_full((1,), x.numel() // max(sums.numel(), 1)))
        found.append((sums / count).to(x.dtype))
    if kind != "avg":
        found += rows.merge((x.amax(dims),), lambda a, b: (torch.maximum(a[0], b[0]),))
    return found[0] if len(found) == 1 else 0.5 * (found[0] + found[1])


class SplitPool(SplitLayer):
    """The pooling of a classifier of maps."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, rows, W] -> as the layer."""
        pool: Any = self
        rows = rows_here(self.split_name)
        if not pool.pool_type:
            return super().forward(x)
        y = pooled(rows, x, [2, 3], pool.pool_type)
        return pool.flatten(y[:, :, None, None])


class SplitModel(SplitLayer):
    """A parallelised model."""

    def set_classifier(self, num_classes: int, global_pool: str | None) -> None:
        """Refuse: the new one would not be parallelised.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("replace the classifier before the model is parallelised")

    def fuse(self) -> Any:
        """Refuse: fused layers would not be parallelised.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("fuse the model before it is parallelised")


class SplitTokens(SplitModel):
    """A parallelised model of one resolution."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """As `IsotropicBackbone`, with the pooling of the tokens of all processes."""
        model: Any = self
        rows = rows_here("the classifier")
        if model.global_pool in ("", "token"):
            x = global_pool_nlc(
                x, pool_type=model.global_pool, num_prefix_tokens=model.num_prefix_tokens
            )
        else:
            x = pooled(rows, x[:, model.num_prefix_tokens :], [1], model.global_pool)
        x = model.head_drop(x)
        return x if pre_logits else model.head(x)
