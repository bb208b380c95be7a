"""A model of timm's registry that is another one with attentions replaced.

timm saves the name of a model and the arguments that built it. This name, and these arguments, are
how a model that `replace_attention` changed is built again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    is_model,
    register_model,
    split_model_name_tag,
)
from torch import nn

from vitlinear.errors import did_you_mean

from .replace import ARCHITECTURE, replace_attention

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
        ValueError: ``base`` is missing or unknown, or as `replace_attention`.
    """
    if not base:
        raise ValueError(
            f"{ARCHITECTURE} needs base=NAME and replacements=[...], as "
            "vitlinear.replace_attention records them"
        )
    name, tag = split_model_name_tag(base)
    if not is_model(name) or name == ARCHITECTURE:
        raise ValueError(f"unknown base {base!r}{did_you_mean(name, timm.list_models())}")
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
        for replacement in replacements:
            given = dict(replacement)
            options = given.pop("options", None) or {}
            replace_attention(model, given.pop("attention"), **given, **options)
        return model

    feature_cfg = _feature_cfg(name, kwargs) if kwargs.get("features_only") else None
    model = build_model_with_cfg(
        build, name, pretrained and own_weights, feature_cfg=feature_cfg, **kwargs
    )
    module: Any
    for module in model.modules():  # a wrapper, and the model in it
        cfg = getattr(module, "pretrained_cfg", None)
        if isinstance(cfg, dict):
            module.pretrained_cfg = module.default_cfg = {**cfg, "architecture": ARCHITECTURE}
    return model


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
