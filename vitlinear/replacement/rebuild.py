"""A model of timm's registry that is another one with attentions replaced.

timm saves the name of a model and the arguments that built it. This name, and these arguments, are
how a model that `replace_attention` changed is built again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import timm
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    is_model,
    model_entrypoint,
    register_model,
    split_model_name_tag,
)
from torch import Tensor, nn

from vitlinear.errors import did_you_mean

from .replace import ARCHITECTURE, replace_with

__all__: list[str] = []  # `register_model` adds to it

_SOURCES = ("url", "file", "hf_hub_id", "state_dict")
_OF_WEIGHTS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")

# Of every base: its own configuration goes before this one, which says that sizes may be asked for.
default_cfgs = generate_default_cfgs({f"{ARCHITECTURE}.untrained": {"fixed_input_size": True}})


@register_model
def replaced_attention(
    pretrained: bool = False,
    base: str = "",
    replacements: Sequence[Mapping[str, Any]] = (),
    **kwargs: Any,
) -> nn.Module:
    """A model of timm's with attentions replaced.

    Args:
        pretrained: Load weights: those that ``pretrained_cfg`` names, which are of the model as it
            is after the replacements; without it those of ``base``, which are loaded before.
        base: Name of the model, with or without a tag.
        replacements: Arguments of `replace_attention`, in order: ``attention``, ``blocks``,
            ``keep``, ``rope`` and ``options``.
        **kwargs: As `timm.create_model` takes them for ``base``.

    Raises:
        ValueError: ``base`` is missing or unknown, ``replacements`` are no arguments of
            `replace_attention`, or as that; one line.
    """
    if not base:
        raise ValueError(
            f"{ARCHITECTURE} needs base=NAME and replacements=[...], as "
            "vitlinear.replace_attention records them"
        )
    name, tag = split_model_name_tag(base)
    if not is_model(name) or name == ARCHITECTURE:
        raise ValueError(f"unknown base {base!r}{did_you_mean(name, timm.list_models())}")
    checked = _checked(replacements)
    given = kwargs.get("pretrained_cfg")
    own_weights = isinstance(given, Mapping) and any(given.get(key) for key in _SOURCES)
    own = timm.get_pretrained_cfg(ARCHITECTURE)
    if isinstance(given, str) or (own is not None and given == own.to_dict()):
        kwargs["pretrained_cfg"] = None  # that of this name, which tells nothing of the base
    if tag and not kwargs.get("pretrained_cfg"):
        kwargs["pretrained_cfg"] = tag
    of_weights = {key: kwargs[key] for key in _OF_WEIGHTS if key in kwargs}

    def build(**model_kwargs: Any) -> nn.Module:
        model = timm.create_model(
            name, pretrained=pretrained and not own_weights, **of_weights, **model_kwargs
        )
        for arguments in checked:
            replace_with(model, **arguments)
        return model

    feature_cfg = _feature_cfg(name, kwargs) if kwargs.get("features_only") else None
    model = build_model_with_cfg(
        build,
        name,
        pretrained and own_weights,
        feature_cfg=feature_cfg,
        pretrained_filter_fn=_filter_of(name),
        **kwargs,
    )
    module: Any
    for module in model.modules():  # a wrapper, and the model in it
        cfg = getattr(module, "pretrained_cfg", None)
        if isinstance(cfg, dict):
            module.pretrained_cfg = module.default_cfg = {**cfg, "architecture": ARCHITECTURE}
    return model


def _checked(replacements: Any) -> list[dict[str, Any]]:
    """Replacements as arguments of `replace_with`.

    Raises:
        ValueError: They are none; one line.
    """
    if not isinstance(replacements, (list, tuple)) or not replacements:
        raise ValueError(
            f"replacements must be a list of mappings, at least one, got {replacements!r}"
        )
    defaults: dict[str, Any] = {
        "attention": None,
        "blocks": None,
        "keep": None,
        "rope": False,
        "options": {},
    }
    checked = []
    for replacement in replacements:
        if not isinstance(replacement, Mapping) or "attention" not in replacement:
            raise ValueError(
                "each of replacements must be a mapping with 'attention' and, where wanted, "
                f"'blocks', 'keep', 'rope' and 'options', got {replacement!r}"
            )
        for key in replacement:
            if key not in defaults:
                near = did_you_mean(str(key), defaults)
                raise ValueError(
                    f"replacements have no {key!r}{near}; they have: {', '.join(defaults)} "
                    "(options of the attention stand in 'options')"
                )
        arguments = {**defaults, **replacement}
        options = {} if arguments["options"] is None else arguments["options"]
        if not isinstance(options, Mapping):
            raise ValueError(f"options of a replacement must be a mapping, got {options!r}")
        checked.append({"name": arguments.pop("attention"), **arguments, "options": options})
    return checked


def _filter_of(name: str) -> Any:
    """How the family of a base fits weights to a model, such as positions to its size.

    By timm's custom it is a function of this name in the file of the family.
    """
    file = sys.modules[model_entrypoint(name).__module__]
    fit = getattr(file, "checkpoint_filter_fn", None)
    if fit is None:
        return None

    def fit_all_but_lost_tables(state_dict: dict[str, Tensor], model: nn.Module) -> Any:
        # Filters look up the table in the model. Loading tells of those that are not there.
        table = "relative_position_bias_table"
        tables = {key for key, _ in model.named_parameters() if key.endswith(table)}
        lost = {k: v for k, v in state_dict.items() if k.endswith(table) and k not in tables}
        rest = {key: value for key, value in state_dict.items() if key not in lost}
        return {**fit(rest, model), **lost}

    return fit_all_but_lost_tables


def _feature_cfg(name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """How timm wraps a model for ``features_only``, asked of one without storage."""
    given = {key: value for key, value in kwargs.items() if key not in _OF_WEIGHTS}
    given.pop("pretrained_model_args", None)
    wrapped: Any = timm.create_model(name, **{**given, "device": "meta"})
    modules = [info["module"] for info in wrapped.feature_info.info]
    return {
        "feature_cls": type(wrapped),
        "out_indices": wrapped.feature_info.out_indices,
        # timm takes it from wrappers that have no use for it.
        "flatten_sequential": any(module.replace(".", "_") in wrapped for module in modules),
    }
