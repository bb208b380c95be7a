"""A timm model from flags, with errors that say what to change."""

import warnings
from typing import Any

import timm
import torch
from timm.data import resolve_input_data_config
from timm.models import is_model, resolve_model_input_args, split_model_name_tag
from torch import nn
from torch._inductor import list_mode_options

import vitlinear  # noqa: F401  registers the models with timm
from vitlinear.errors import UserError, one_line
from vitlinear.train.config import did_you_mean

# Of `torch.compile`: tensors stay in the layout they have (`docs/compile.md`).
KEEP_LAYOUT = {"layout_optimization": False}


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


def check_model_kwargs(kwargs: dict[str, Any]) -> None:
    """Refuses constructor arguments that have flags of their own, which other things depend on."""
    for key in ("num_classes", "in_chans", "pretrained"):
        if key in kwargs:
            raise UserError(f"give {key} as --{key.replace('_', '-')}, not in --model-kwargs")
    if kwargs.get("features_only"):
        raise UserError("--model-kwargs features_only makes a model without logits: leave it out")


def build_model(name: str, *, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Builds a model with ``timm.create_model``.

    Args:
        name: Registered name, with or without a tag.
        pretrained: Fetch the tag's weights.
        **kwargs: Constructor arguments; None means the default.

    Raises:
        UserError: Unknown name or argument, or no such weights.
    """
    check_model_name(name)
    try:
        # The factory's own rule for which models take their input size as an argument.
        size = {key: kwargs.pop(key, None) for key in ("img_size", "input_size")}
        resolved = resolve_model_input_args(name, size, **kwargs)
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


def compile_arguments(model: nn.Module, backend: str, mode: str | None = None) -> dict[str, Any]:
    """Arguments of `torch.compile` that suit a model.

    Inductor's layout optimisation takes each tensor of four axes that it keeps near a convolution
    for [B, C, H, W] and copies it to channels-last. Our maps are [B, H, W, C] and heads
    [B, h, N, D]: they are to stay as they are (`docs/compile.md`).

    Args:
        model: The model, or one of its blocks.
        backend: A backend of `torch.compile`.
        mode: A mode of `torch.compile`, of inductor alone.

    Raises:
        UserError: Unknown mode.
    """
    if backend != "inductor" or not type(model).__module__.startswith("vitlinear."):
        return {"backend": backend, "mode": mode}
    try:
        options = list_mode_options(mode or "default")
    except RuntimeError as error:
        raise UserError(f"--torchcompile-mode: {one_line(error)}") from error
    return {"backend": backend, "options": {**options, **KEEP_LAYOUT}}


def data_config(model: nn.Module, requested: dict[str, Any]) -> dict[str, Any]:
    """Returns input size, normalisation and crop for a model, flags before the model's own.

    Normalisation statistics are returned with one value per channel.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = resolve_input_data_config(model, args=requested)
    except (ValueError, AssertionError) as error:
        raise UserError(f"input of the model: {one_line(error)}") from error
    channels = config["input_size"][0]
    for key in ("mean", "std"):
        values = tuple(float(value) for value in config[key])
        config[key] = values * channels if len(values) == 1 else values
    return config


def choose_device(name: str | None) -> torch.device:
    """Returns the device that ``--device`` means, by default cuda where there is one."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error).split(". ")[0]
        raise UserError(f"--device {name} cannot be used here: {reason}") from error
    return device


def enable_checkpointing(model: nn.Module, name: str) -> None:
    """Turns gradient checkpointing on, or says that the model has none."""
    try:
        model.set_grad_checkpointing(enable=True)  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:
        raise UserError(
            f"{name} has no gradient checkpointing: drop --grad-checkpointing"
        ) from error
