"""Mistakes in a config that can be told before anything runs or is written."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from vitlinear.checkpoints.card import read_card
from vitlinear.create import check_model_name
from vitlinear.errors import Notice, UserError

WEB = ("http", "https")


def check_config(config: Config, parts: tuple[str, ...]) -> None:
    """Refuse a config whose backbone, weights or data are not there.

    Args:
        config: The whole.
        parts: What is going to be used, out of ``train``, ``val`` and ``test``.

    Raises:
        UserError: The message names the model or the file, and the key that it stands under.
    """
    for key, backbone in backbones(config):
        if not backbone.get("model"):
            raise UserError(f"the backbone has no model: set {key}.model, e.g. to ravlt_t")
        check_model_name(backbone["model"])
        init = backbone.get("init_cfg")
        for rule in [init] if isinstance(init, Mapping) else init or ():
            if rule.get("type") == "Pretrained":
                if not rule.get("checkpoint"):
                    raise UserError(f"{key}.init_cfg names no file: set {key}.init_cfg.checkpoint")
                scheme, address, _ = rule["checkpoint"].partition("://")
                if address and scheme not in WEB:
                    raise UserError(
                        f"{key}.init_cfg.checkpoint is {rule['checkpoint']}: give a file, or an "
                        "address of http or https"
                    )
                _check_set(rule["checkpoint"], f"{key}.init_cfg.checkpoint")
    for part in parts:
        for key, section in sections(config.get(f"{part}_dataloader"), f"{part}_dataloader"):
            if section.get("decode_backend") == "pickle":
                raise UserError(f"{key}.decode_backend: pickles can do anything when they are read")
            if "data_root" in section or "ann_file" in section:
                _check_dataset(section, key)
        for key, section in sections(config.get(f"{part}_evaluator"), f"{part}_evaluator"):
            if section.get("ann_file"):
                _check_set(section["ann_file"], f"{key}.ann_file")


def sections(value: Any, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping in a part of a config, with the key that leads to it."""
    if isinstance(value, Mapping):
        yield key, value
        for name, inner in value.items():
            yield from sections(inner, f"{key}.{name}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from sections(inner, f"{key}.{index}")


def backbones(config: Config) -> list[tuple[str, dict[str, Any]]]:
    """Our backbones in a config's model, with the keys that lead to them."""
    found = sections(config.get("model"), "model")
    return [(key, part) for key, part in found if part.get("type") == "vitlinear.Backbone"]


def without_start_weights(backbone: dict[str, Any]) -> None:
    """Take out of a backbone's section what training started from, which need not be here.

    A file of ours names arguments of its model, which `name_arguments` has left in the config of a
    run. A config without them needs the file.
    """
    backbone.update(pretrained=False, init_cfg=None)
    start = backbone.get("checkpoint_path")
    if start is not None and Path(start).is_file():
        name_arguments(backbone)
    elif start is not None:
        warnings.warn(
            f"{start} is not there: if its card names arguments of the model, the config has to "
            "have them",
            Notice,
            stacklevel=2,
        )
    backbone.pop("checkpoint_path", None)


def name_arguments(backbone: dict[str, Any]) -> None:
    """Put into a backbone's section the arguments that the card of its weights names."""
    start = backbone.get("checkpoint_path")
    card = None if start is None else read_card(Path(start))
    for key, value in (card.backbone_args() if card is not None else {}).items():
        backbone.setdefault(key, value)


def _check_dataset(section: Mapping[str, Any], key: str) -> None:
    """Check the folders and the file of a data set, which are relative to its ``data_root``."""
    root = section.get("data_root") or ""
    if root:
        _check_set(root, f"{key}.data_root")
    prefixes = section.get("data_prefix") or {}
    places = {"ann_file": section.get("ann_file")}
    places |= {f"data_prefix.{name}": prefix for name, prefix in prefixes.items()}
    for name, place in places.items():
        if isinstance(place, str) and place:
            _check_set(place if "://" in place else str(Path(root, place)), f"{key}.{name}")


def check_exists(path: str, remedy: str) -> None:
    """Refuse a path that leads to nothing; addresses of other kinds are mmengine's to judge."""
    if "://" not in path and not Path(path).exists():
        raise UserError(f"{path} does not exist: {remedy}")


def _check_set(path: str, key: str) -> None:
    check_exists(path, f"set {key}, in the config or with --cfg-options")
