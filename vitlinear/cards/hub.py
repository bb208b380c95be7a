"""The card of one model, as timm's ``push_to_hf_hub`` takes it."""

from __future__ import annotations

from typing import Any

from timm.models import get_model_args
from torch import nn

from vitlinear.checkpoints.card import Card
from vitlinear.facts import family_of
from vitlinear.models import num_parameters, our_models
from vitlinear.replacement import ARCHITECTURE

from .render import mega

SHOWN = 20  # names of classes
USAGE = """```python
import timm
import vitlinear  # registers the models

model = timm.create_model("{source}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
names = model.pretrained_cfg.get("label_names")
```
"""


def model_card(
    model: nn.Module,
    license: str | None = None,
    repo_id: str | None = "OWNER/NAME",
    card: Card | None = None,
) -> dict[str, Any]:
    """The card of a model: ``push_to_hf_hub(model, repo, model_card=...)``.

    Args:
        model: Made by ``timm.create_model`` or `vitlinear.load`, with the classes and channels that
            it is pushed with.
        license: Identifier of the weights' licence on the hub; by default that of the authors'
            weights of the family, ``unknown`` where they state none.
        repo_id: Where it is pushed to, for the line that loads it; None for a folder on a disk.
        card: The card of the model's file, for how it was trained.
    """
    name: str = model.pretrained_cfg["architecture"]  # type: ignore[index, assignment]
    source = f"hf-hub:{repo_id}" if repo_id else "local-dir:FOLDER"
    about = _of_the_family(name) if name in our_models() else _of_timm(model, name)
    return {
        "license": license or about.get("license", "unknown"),
        "tags": ["image-classification", "timm", *about.get("tags", ())],
        **({"description": about["description"]} if "description" in about else {}),
        "details": {
            **about["model"],
            "Parameters": mega(num_parameters(model)),
            "Classes": model.num_classes,
            "Input channels": get_model_args(model)["in_chans"],
            **(_training(card) if card else {}),
            **about.get("paper", {}),
        },
        "usage": USAGE.format(source=source),
    }


def _of_the_family(name: str) -> dict[str, Any]:
    """The part of a card that the facts know, for a model of this package."""
    family = family_of(name)
    facts, paper = family.model(name), family.paper
    return {
        "license": family.hub_license,
        "tags": ["vitlinear", "linear-attention", f"arxiv:{paper['arxiv']}"],
        "description": " ".join(family.summary.split()),
        "model": {
            "Model": f"{name} ({family.title})",
            "Attention by stage": facts.attention,
            **({"Note": facts.note} if facts.note else {}),
        },
        "paper": {
            "Paper": f"{paper['title']}: https://arxiv.org/abs/{paper['arxiv']}",
            **({"Code of the authors": family.code} if family.code else {}),
        },
    }


def _of_timm(model: nn.Module, name: str) -> dict[str, Any]:
    """The part of a card that says which model of timm's it is, and what was replaced in it."""
    arguments = get_model_args(model)
    if name != ARCHITECTURE:
        return {"model": {"Model": f"timm's {name}"}}
    replaced = "; ".join(
        f"{one['attention']} in blocks {', '.join(map(str, one['blocks']))}"
        for one in arguments["replacements"]
    )
    return {
        "tags": ["vitlinear"],
        "model": {"Model": f"timm's {arguments['base']}", "Replaced attention": replaced},
    }


def _training(card: Card) -> dict[str, Any]:
    """Training, input and class names, by the card of a weights file."""
    names, config = card.class_names or [], card.data_config
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    size = "x".join(map(str, config.input_size))
    return {
        **({"Class names": shown} if names else {}),
        "Input": f"{size}, mean {list(config.mean)}, std {list(config.std)}, "
        f"{config.interpolation}, crop_pct {config.crop_pct}, {config.crop_mode}",
        **({"Trained on": card.dataset} if card.dataset else {}),
        **({"Epochs": card.epoch} if card.epoch else {}),
        **{f"Held-out {key}": f"{value:.2f}" for key, value in card.metric.items()},
        **({"Weights": "moving average of those in training"} if card.weights == "ema" else {}),
    }
