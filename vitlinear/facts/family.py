"""Families and their models, as objects: the published part of the facts file."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from functools import cache
from typing import Any

from .document import FACTS, document

SECONDARY = "secondary"


@dataclasses.dataclass(frozen=True)
class PublishedFigures:
    """The figures published of one model.

    Attributes:
        top1: ImageNet-1K accuracy in percent, by tag of the weights.
        source: Where it was read.
        params: Millions; None if not stated.
        macs: 1e9 multiply-adds, in the publication's own convention; likewise.
    """

    top1: Mapping[str, float]
    source: str
    params: float | None = None
    macs: float | None = None

    @property
    def secondary(self) -> bool:
        """Whether the source is not the authors' own."""
        return self.source.startswith(SECONDARY)


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """The facts of one model.

    Attributes:
        name: timm's.
        attention: By stage, in words.
        released: The authors' name of it; None for models of ours.
        published: None where nothing is.
        note: One that its family has for models of ours.
    """

    name: str
    attention: str
    released: str | None = None
    published: PublishedFigures | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Family:
    """One entry of the facts file, for one model card."""

    name: str
    title: str
    summary: str
    paper: Mapping[str, str]
    code: str | None
    hub_license: str
    weights_license: str
    mechanism: str
    stages: str
    sources: Mapping[str, str]
    models: Mapping[str, ModelFacts]
    siblings: tuple[Mapping[str, str], ...]
    notes: tuple[str, ...]
    backbone_type: str | None = None

    def has(self, name: str) -> bool:
        """Whether a model is one of this family's, published or a sibling."""
        return name in self.models or any(
            fnmatch.fnmatch(name, row["pattern"]) for row in self.siblings
        )

    def model(self, name: str) -> ModelFacts:
        """Facts of a model of this family.

        Raises:
            KeyError: The facts file does not have it.
        """
        if name in self.models:
            return self.models[name]
        for row in self.siblings:
            if fnmatch.fnmatch(name, row["pattern"]):
                return ModelFacts(name, row["attention"], note=row.get("note", ""))
        raise KeyError(f"{name} is not in {FACTS}: add it to {self.name}")


def _model(name: str, row: Mapping[str, Any], sources: Mapping[str, str]) -> ModelFacts:
    published = row.get("published")
    return ModelFacts(
        name=name,
        attention=row["attention"],
        released=row.get("released"),
        published=published
        and PublishedFigures(
            top1=published["top1"],
            source=sources[published["source"]].strip(),
            params=published.get("params"),
            macs=published.get("macs"),
        ),
    )


@cache
def families() -> dict[str, Family]:
    """Every family of the facts file, by name."""
    result = {}
    for name, row in document().items():
        sources = row["sources"]
        models = {key: _model(key, value, sources) for key, value in row["models"].items()}
        texts = {key: row[key].strip() for key in ("title", "summary", "stages", "weights_license")}
        result[name] = Family(
            name=name,
            paper=row["paper"],
            code=row["code"],
            hub_license=row["hub_license"],
            mechanism=row["mechanism"].rstrip(),
            sources=sources,
            models=models,
            siblings=tuple(row.get("siblings", ())),
            notes=tuple(note.strip() for note in row["notes"]),
            backbone_type=row.get("backbone_type"),
            **texts,
        )
    return result


def family_of(name: str) -> Family:
    """The family of a model.

    Raises:
        KeyError: No family has it.
    """
    for family in families().values():
        if family.has(name):
            return family
    raise KeyError(f"{name} belongs to no family of {FACTS}")


def convention(published: float, counted: Mapping[str, Any]) -> str:
    """Tell what a published number of G multiply-adds counts, judged by what we counted.

    Returns:
        ``'projections'`` or ``'total'``, whichever is nearer, or ``'neither'`` if both are more
        than 3% away: a figure with one decimal of a small model is that far from itself.
    """
    distance = {
        part: abs(published / (counted[part] / 1e9) - 1) for part in ("projections", "total")
    }
    nearest = min(distance, key=lambda part: distance[part])
    return nearest if distance[nearest] <= 0.03 else "neither"
