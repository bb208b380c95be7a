"""A timm model by its name; mistakes in what was asked for are `UserError`s that name the flag."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import timm
from timm.data import resolve_input_data_config
from timm.models import is_model, resolve_model_input_args, split_model_name_tag
from torch import nn

from vitlinear.errors import UserError, did_you_mean, one_line


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The way from an image to the input of a model, in timm's terms.

    Attributes:
        input_size: Channels, height and width.
        mean: Of each channel, from 0 to 1.
        std: Likewise.
        interpolation: Of the resizing: ``bicubic``, ``bilinear``, ...
        crop_pct: Part of the shorter side that the crop for evaluation keeps.
        crop_mode: ``center``, ``squash`` or ``border``.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """Returns it of its fields by name, as JSON has them; lists become tuples.

        Raises:
            TypeError: One is missing, or is not known.
        """
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**plain)

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields by name, as timm's functions take them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def check_model_name(name: str | None) -> str:
    """Returns ``name`` if timm can build it.

    Names with a source prefix (``hf-hub:``, ``local-dir:``) are timm's to judge.
    """
    if not name:
        raise UserError("no model: give --model NAME, e.g. --model ravlt_t")
    if ":" not in name and not is_model(split_model_name_tag(name)[0]):
        known = timm.list_models()
        raise UserError(f"unknown model '{name}'{did_you_mean(name, known)}")
    return name


def registered_name(model: nn.Module, name: str) -> str:
    """Returns the name under which timm's registry has a model.

    Args:
        model: The model.
        name: The name that it was made by. With a source prefix it is a place, which may move.
    """
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    return str(cfg["architecture"]) if ":" in name else name


def check_model_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Refuses constructor arguments that have flags of their own, which other things depend on."""
    for key in ("num_classes", "in_chans", "pretrained"):
        if key in kwargs:
            raise UserError(f"give {key} as --{key.replace('_', '-')}, not in --model-kwargs")
    if "checkpoint_path" in kwargs:
        raise UserError(
            "give checkpoint_path as --checkpoint, in training as --initial-checkpoint, not in "
            "--model-kwargs"
        )
    if kwargs.get("features_only"):
        raise UserError("--model-kwargs features_only makes a model without logits: leave it out")


def build_model(
    name: str,
    *,
    pretrained: bool = False,
    sizes: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Builds a model with ``timm.create_model``.

    Args:
        name: Registered name, with or without a tag.
        pretrained: Fetch the tag's weights.
        sizes: ``img_size`` or ``input_size`` of the images, for models that are made for one size;
            others take any.
        **kwargs: Constructor arguments, ``img_size`` too; None means the default.

    Raises:
        UserError: Unknown name or argument, or no such weights.
    """
    check_model_name(name)
    try:
        # The factory's own rule for which models take their input size as an argument.
        resolved = resolve_model_input_args(name, dict(sizes or {}), **kwargs)
        resolved.pop("model_name"), resolved.pop("pretrained_cfg")
        source = {key: kwargs.get(key) for key in ("pretrained_cfg", "pretrained_cfg_overlay")}
        return timm.create_model(name, pretrained=pretrained, **source, **resolved)
    except ImportError as error:
        raise UserError(
            f"{name} needs {error.name}, which is missing: pip install {error.name}"
        ) from error
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        what = "build or fetch the weights of" if pretrained else "build"
        raise UserError(f"cannot {what} {name}: {one_line(error)}") from error


# Ways to resize an image, by timm's names.
INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "box", "hamming", "lanczos")


def data_config(model: nn.Module, requested: Mapping[str, Any]) -> Preprocessing:
    """Returns how images become the input of a model.

    Args:
        model: The model; what is not asked for is its own.
        requested: What is asked for, by the names of flags: ``img_size``, ``mean`` and so on.

    Raises:
        UserError: The model does not take such images.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = resolve_input_data_config(model, args=dict(requested))
    except (ValueError, AssertionError) as error:
        raise UserError(f"input of the model: {one_line(error)}") from error
    if config["interpolation"] not in INTERPOLATIONS:
        raise UserError(
            f"unknown --interpolation {config['interpolation']}: {', '.join(INTERPOLATIONS)}"
        )
    channels = config["input_size"][0]
    for key in ("mean", "std"):
        values = tuple(float(value) for value in config[key])
        config[key] = values * channels if len(values) == 1 else values
    return Preprocessing.of(config)
