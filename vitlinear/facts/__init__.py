"""Facts about every family, in `facts.yaml`: figures with sources, files of weights, costs."""

from .document import COUNTS, FACTS, counts
from .family import Family, ModelFacts, PublishedFigures, convention, families, family_of
from .published import (
    BY_HASH,
    NONE_STATED,
    PUBLISHED,
    PublishedFile,
    pretrained_source,
    published_at,
    published_files,
    published_row,
)

__all__ = [
    "BY_HASH",
    "COUNTS",
    "FACTS",
    "NONE_STATED",
    "PUBLISHED",
    "Family",
    "ModelFacts",
    "PublishedFigures",
    "PublishedFile",
    "convention",
    "counts",
    "families",
    "family_of",
    "pretrained_source",
    "published_at",
    "published_files",
    "published_row",
]
