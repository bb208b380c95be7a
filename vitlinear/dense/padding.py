"""Padded batches: a model sees of each image what it would see of that image alone.

Detectors and segmenters batch images of several sizes by padding them, after normalisation, with
zeros to the right and below. Attention over the whole map would take that padding for image, and
from the second convolution on it is not even zero. Inside `padding` every attention of a model
leaves padding out, and whatever else mixes tokens finds zeros there, as it does around an image
that stands alone::

    images = attach_valid_sizes(images, [(480, 600), (512, 768)])   # where the batch is made

    with padding(model, images.shape[-2:], valid_sizes_of(images)):  # where the model is called
        maps = model.forward_intermediates(images, intermediates_only=True)

What the maps hold beyond the valid part of an image has no meaning; `zero_padding`, inside, makes
it zero, which training asks for. Gradient checkpointing recomputes under the sizes of its own
forward pass; `docs/padding.md` says what each kind of layer does. What remains different:

- Batch norm in training mode counts padding; with running statistics it does not.
- Poolings of classifiers count padding: this is for maps.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor, nn

from vitlinear.errors import UserError
from vitlinear.layers.padding_rule import (
    MASK,
    MASK_CHANNELS_FIRST,
    SIZES,
    ZEROS,
    ZEROS_CHANNELS_FIRST,
)
from vitlinear.models._valid_region import ValidRegion, use_valid_region, valid_region

Sizes = Sequence[tuple[int, int]]
_ADDING = threading.Lock()


def attach_valid_sizes(images: Tensor, valid_sizes: Sizes) -> Tensor:
    """Note on a padded batch how large its images are.

    Args:
        images: [B, C, H, W]. The note is an attribute of this tensor: what is computed from it,
            a copy on another device included, has none.
        valid_sizes: Height and width of each image in pixels.

    Returns:
        The same tensor.

    Raises:
        UserError: The sizes do not fit the batch.
    """
    images.valid_sizes = check_sizes(valid_sizes, images.shape[0], images.shape[-2:])  # type: ignore[attr-defined]
    return images


def valid_sizes_of(images: Tensor) -> tuple[tuple[int, int], ...] | None:
    """The sizes that `attach_valid_sizes` noted on a batch, or None."""
    return getattr(images, "valid_sizes", None)


def check_sizes(
    valid_sizes: Sizes, batch: int, image_size: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """The sizes as plain numbers.

    Raises:
        UserError: There is not one for each image, or an image is empty or larger than the batch.
    """
    sizes = tuple((int(height), int(width)) for height, width in valid_sizes)
    if len(sizes) != batch:
        raise UserError(f"got {len(sizes)} valid sizes for a batch of {batch} images")
    for height, width in sizes:
        if not (1 <= height <= image_size[0] and 1 <= width <= image_size[1]):
            raise UserError(
                f"a valid size of {height} x {width} does not fit padded images of "
                f"{image_size[0]} x {image_size[1]}; sizes are (height, width) in pixels"
            )
    return sizes


@contextmanager
def padding(
    model: nn.Module, image_size: Sequence[int], valid_sizes: Sizes | None
) -> Iterator[None]:
    """Let forward passes inside compute the valid part of each image as if it stood alone.

    The first use leaves hooks on the model that do nothing outside; `remove_hooks` takes them off,
    for `torch.jit.script`. Programs of `torch.compile` are right if they enter the context
    themselves; one that was compiled outside would not see the sizes, which is an error.

    Args:
        model: A model of this package, or a module that holds one.
        image_size: Height and width of the padded images.
        valid_sizes: Height and width of each image in pixels; None if none is padded.

    Raises:
        UserError: The sizes do not fit, or the model has no attention of this package.
        RuntimeError: Nothing inside asked for the sizes.
    """
    full = (int(image_size[0]), int(image_size[1]))
    sizes = () if valid_sizes is None else check_sizes(valid_sizes, len(valid_sizes), full)
    if all(size == full for size in sizes):
        with use_valid_region(None):
            yield
        return
    add_hooks(model)
    rounds_down = any(getattr(module, "rounds_down", False) for module in model.modules())
    patches = [x.patch_size[0] for x in model.modules() if isinstance(x, PatchEmbed)]
    region = ValidRegion(full, sizes, rounds_down, patch_size=patches[0] if patches else 1)
    with use_valid_region(region):
        yield
    if not region.used:
        raise RuntimeError(
            "the model did not see the valid sizes of its batch: enter `padding` inside of what is "
            "compiled, or call the model inside of `padding`"
        )


def zero_padding(x: Tensor) -> Tensor:
    """A map [B, C, H, W] with zeros in its padding; outside of `padding` the map itself.

    For what leaves the model: it keeps gradients out of padding as well. There all tokens of an
    untrained model are constant, so that each layer norm multiplies gradients by 1/sqrt(eps): after
    a dozen blocks those of the parameters are not finite any more.
    """
    region = _region_of(x)
    if region is None:
        return x
    return x.masked_fill(region.mask(x.shape[2], x.shape[3], x.device).unsqueeze(1), 0)


def add_hooks(model: nn.Module) -> None:
    """Make the layers of a model ask for the valid sizes; hooks that are there are kept.

    Raises:
        UserError: The model has no layer of this package that mixes tokens.
    """
    inside: set[nn.Module] = set()  # layers with a rule do themselves what their parts need
    # Threads that share a model look and add one after the other; Dynamo knows no locks.
    with nullcontext() if torch.compiler.is_compiling() else _ADDING:
        for module in model.modules():
            hook = _hook_for(module)
            if hook is None or module in inside:
                continue
            if hasattr(module, "padding_rule"):
                inside.update(module.modules())
            if hook not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(hook, with_kwargs=True)
    if not inside:
        raise UserError(
            f"{type(model).__name__} has no attention of vitlinear, so valid sizes cannot keep "
            "padding out of it; call it without them"
        )


def remove_hooks(model: nn.Module) -> None:
    """Take away what `padding` left on a model."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook in _HOOKS.values():
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


_Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _region_of(x: Tensor) -> ValidRegion | None:
    """The region that this forward pass runs under.

    Raises:
        UserError: It is that of another batch.
    """
    region = valid_region()
    if region is not None and len(region.valid_sizes) != x.shape[0]:
        raise UserError(
            f"got {len(region.valid_sizes)} valid sizes for a batch of {x.shape[0]} images"
        )
    return region


def _map_size(x: Tensor, args: tuple[Any, ...]) -> tuple[int, int]:
    """Height and width of a map [B, H, W, C], or of the map among tokens [B, N, C]."""
    height, width = x.shape[1:3] if x.dim() == 4 else args[1:3]
    return height, width


def _give_mask(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> _Inputs | None:
    """Forward pre-hook of layers with the rule `MASK`."""
    x = args[0]
    region = _region_of(x)
    if region is None:
        return None
    height, width = _map_size(x, args)
    mask = region.mask(height, width, x.device)
    if x.dim() == 3:
        mask = F.pad(mask.flatten(1), (x.shape[1] - height * width, 0))
    return args, {**kwargs, "key_padding_mask": mask}


def _give_map_mask(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> _Inputs | None:
    """Forward pre-hook of layers with the rule `MASK_CHANNELS_FIRST`."""
    x = args[0]
    region = _region_of(x)
    if region is None:
        return None
    return args, {**kwargs, "key_padding_mask": region.mask(x.shape[2], x.shape[3], x.device)}


def _give_sizes(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> _Inputs | None:
    """Forward pre-hook of layers with the rule `SIZES`."""
    region = _region_of(args[0])
    if region is None:
        return None
    return args, {**kwargs, "valid_sizes": region.map_sizes(*_map_size(args[0], args))}


def _zero_tokens(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> _Inputs | None:
    """Forward pre-hook of layers with the rule `ZEROS`."""
    region = _region_of(args[0])
    if region is None:
        return None
    x, *rest = args
    mask = region.mask(x.shape[1], x.shape[2], x.device)
    return (x.masked_fill(mask.unsqueeze(-1), 0), *rest), kwargs


def zero_map(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> _Inputs | None:
    """Forward pre-hook of modules that mix the places of a map [B, C, H, W]: zeros in padding."""
    x, *rest = args
    return (zero_padding(x), *rest), kwargs


_HOOKS = {
    MASK: _give_mask,
    MASK_CHANNELS_FIRST: _give_map_mask,
    SIZES: _give_sizes,
    ZEROS: _zero_tokens,
    ZEROS_CHANNELS_FIRST: zero_map,
}


def _hook_for(module: nn.Module) -> Any:
    rule = getattr(module, "padding_rule", None)
    if rule is not None:
        return _HOOKS[rule]
    if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1:
        return zero_map
    return None
