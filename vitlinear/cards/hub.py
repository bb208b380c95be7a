"""The card of one model, as timm's ``push_to_hf_hub`` takes it."""

from __future__ import annotations

from typing import Any

from timm.models import get_model_args
from torch import nn

from vitlinear.facts import family_of
from vitlinear.models import num_parameters

from .render import mega


def model_card(
    model: nn.Module, license: str | None = None, repo_id: str = "OWNER/NAME"
) -> dict[str, Any]:
    """The card of a model of this package: ``push_to_hf_hub(model, repo, model_card=...)``.

    Args:
        model: Made by ``timm.create_model``, with the classes and channels that it is pushed with.
        license: Identifier of the weights' licence on the hub; by default that of the authors'
            weights of the family, ``unknown`` where they state none.
        repo_id: Where it is pushed to, for the line that loads it.
    """
    name: str = model.pretrained_cfg["architecture"]  # type: ignore[index, assignment]
    family = family_of(name)
    facts, paper = family.model(name), family.paper
    channels = get_model_args(model)["in_chans"]
    return {
        "license": license or family.hub_license,
        "tags": [
            "image-classification", "timm", "vitlinear", "linear-attention",
            f"arxiv:{paper['arxiv']}",
        ],
        "description": " ".join(family.summary.split()),
        "details": {
            "Model": f"{name} ({family.title})",
            "Attention by stage": facts.attention,
            **({"Note": facts.note} if facts.note else {}),
            "Parameters": mega(num_parameters(model)),
            "Classes": model.num_classes,
            "Input channels": channels,
            "Paper": f"{paper['title']}: https://arxiv.org/abs/{paper['arxiv']}",
            **({"Code of the authors": family.code} if family.code else {}),
        },
        "usage": "```python\nimport timm\nimport vitlinear  # registers the models\n\n"
        f'model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()\n```\n',
    }  # fmt: skip
