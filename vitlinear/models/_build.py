"""The builder that every family makes its models with."""

import itertools
from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, get_pretrained_cfg, resolve_pretrained_cfg
from torch import Tensor, nn

from vitlinear.checkpoints import checkpoint_filter_fn
from vitlinear.checkpoints.card import read_card
from vitlinear.checkpoints.download import DownloadError, ensure_downloaded
from vitlinear.checkpoints.load import named_for, notice_of_other_model, read_weights
from vitlinear.checkpoints.mappings import find_mapping
from vitlinear.checkpoints.read import CheckpointError
from vitlinear.checkpoints.translate import common_prefixes, without
from vitlinear.facts import published_files

Model = TypeVar("Model", bound=nn.Module)


def imagenet_cfg(side: int = 224, **kwargs: Any) -> dict[str, Any]:
    """The part of a ``pretrained_cfg`` that is common to all, for square images of this side.

    Evaluation as all families publish it: resize to 256/224 of the side, centre crop, bicubic.
    """
    return {
        "num_classes": 1000,
        "input_size": (3, side, side),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        **kwargs,
    }


def build_model(model_cls: type[Model], name: str, pretrained: bool, **kwargs: Any) -> Model:
    """timm's ``build_model_with_cfg`` with our reader, filter, and downloads that are checked.

    What a file of weights says of itself goes before what the registry says of the model: classes
    and their names, how images are made, and constructor arguments. What the caller gives, in
    ``pretrained_cfg_overlay`` or as arguments, goes before that.

    Args:
        model_cls: Class of the model, with a ``feature_cfg`` for ``features_only=True``.
        name: Registered name.
        pretrained: Load the weights that the ``pretrained_cfg`` names.
        **kwargs: For timm and the model's constructor.

    Raises:
        DownloadError: The weights could not be fetched whole; see `ensure_downloaded`.
        CheckpointError: The file cannot be read, or holds no weights of the model. A ValueError.
        RuntimeError: They do not fit the model.
        ValueError: An ``output_stride`` is asked for, which is a word of dilated convolutions.
    """
    if kwargs.pop("output_stride", None) not in (None, 32):  # 32: what callers give by default
        raise ValueError(
            f"{name} has no output_stride: its strides are those of its stages, and its last map "
            "stays as coarse as it is; leave output_stride out, and take a decoder that joins maps "
            "of several strides, such as an FPN or UperNet"
        )
    own: dict[str, Any] = model_cls.feature_cfg  # type: ignore[attr-defined]
    kwargs["feature_cfg"] = {**own, **kwargs.get("feature_cfg", {})}
    for given in kwargs.get("out_indices"), kwargs["feature_cfg"]["out_indices"]:
        _check_out_indices(given, own["out_indices"])
    path = _weights_file(name, kwargs) if pretrained else None
    if path is None:
        return build_model_with_cfg(
            model_cls, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs
        )
    try:
        weights, card = read_weights(path), read_card(path)
    except CheckpointError as error:
        # torch.hub keeps what came of a download that broke off
        raise CheckpointError(
            f"{error}; if it was downloaded, delete the file, and it is fetched again"
        ) from error
    trained: dict[str, Any] = {}
    if card is not None:
        trained = card.model_kwargs
        kwargs = {**trained, **kwargs}
    # timm would read the file in its own way. It takes a state dict before any file, and copies it
    # with the configuration: so it gets the name, and the filter makes the weights of it.
    asked = kwargs.pop("pretrained_cfg_overlay", None) or {}
    described = card.pretrained_cfg() if card else _classes_of(weights, name)
    overlay = {**described, **asked, "state_dict": {"file": path}}
    model = build_model_with_cfg(
        model_cls,
        name,
        pretrained,
        pretrained_filter_fn=lambda _, model: named_for(model, weights, path, card),
        pretrained_cfg_overlay=overlay,
        **kwargs,
    )
    for module in model.modules():
        if isinstance(cfg := getattr(module, "pretrained_cfg", None), dict):
            cfg.pop("state_dict", None)
    if card is not None:
        notice_of_other_model(path, card, name, kwargs)
    # `create_model` adds what it was given, and timm saves it all with the model.
    model._model_args = {key: kwargs[key] for key in trained}  # type: ignore[assignment]
    return model


def _check_out_indices(given: Any, levels: Any) -> None:
    """Refuse indices of ``features_only=True`` that timm takes for others, or cannot name.

    Args:
        given: A number of last levels, or levels, counted from the end below 0; None if not given.
        levels: All that a model has, where they do not depend on its depth.

    Raises:
        ValueError: One of them is no whole number, there is no such level, or they do not ascend.
    """
    if given is None:
        return
    number = len(levels) if isinstance(levels, tuple) else None
    several = isinstance(given, Iterable)
    for index in given if several else (given,):
        if isinstance(index, bool) or not isinstance(index, Integral):
            raise ValueError(f"out_indices must be whole numbers, got {index!r} in {given!r}")
        if several and number is not None and not -number <= index < number:
            raise ValueError(
                f"out_indices: {index} in {given!r} is out of range, for there are levels 0 to "
                f"{number - 1}"
            )
    if not several:
        if given < 1 or (number is not None and given > number):
            most = "" if number is None else f" and {number} at most"
            raise ValueError(
                f"out_indices={given} is a number of last levels, 1 at least{most}: name levels in "
                "a tuple, such as (-1,)"
            )
        return
    order = [index + number if number and index < 0 else index for index in given]
    # Levels come in their order, whatever the order of the indices.
    if not order or any(a >= b and (a < 0) == (b < 0) for a, b in itertools.pairwise(order)):
        raise ValueError(f"out_indices must ascend, each once, got {given!r}")


def _classes_of(weights: Mapping[str, Tensor], name: str) -> dict[str, int]:
    """How many classes a file without a card is for, by its classifier, as ``num_classes``.

    timm asks the registry, and drops a classifier that the registry's weights would not have.
    """
    cfg = get_pretrained_cfg(name)
    for prefix in ("", *common_prefixes(weights)):
        inner = without(prefix, weights)
        mapping = find_mapping(inner)
        for key, value in inner.items():
            if cfg and (mapping.rename(key) if mapping else key) == f"{cfg.classifier}.weight":
                return {"num_classes": value.shape[0]}
    return {}


def _weights_file(name: str, kwargs: dict[str, Any]) -> Path | None:
    """The file on this machine to read, fetched if need be; None where timm finds the weights."""
    cfg = resolve_pretrained_cfg(
        name,
        pretrained_cfg=kwargs.get("pretrained_cfg"),
        pretrained_cfg_overlay=kwargs.get("pretrained_cfg_overlay"),
    )
    row = next((row for row in published_files(name) if row.task == "classification"), None)
    if row and not (row.wired or cfg.has_weights or cfg.state_dict):
        raise DownloadError(
            f"the weights of {name} are at {row.location}, which timm cannot fetch: {row.note}"
        )
    # Other sources, such as a whole hub repository of somebody's, are timm's alone.
    if cfg.source not in (None, "timm") or cfg.custom_load or cfg.state_dict:
        return None
    if cfg.file:
        return Path(cfg.file)
    return ensure_downloaded(cfg.to_dict(), kwargs.get("cache_dir"))
