"""Where each published file of weights lives, what is known of it, and its licence as stated.

The rows stand in the facts file, with their family. Only those with a confirmed location are wired
into models: see `pretrained_source`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .document import document

NONE_STATED = "none stated"


@dataclass(frozen=True)
class PublishedFile:
    """One published file.

    Attributes:
        family: Name of the model card.
        model: Name of the timm model that it fits; for other tasks, of the backbone.
        tag: timm's tag of the weights: data set and, where it matters, how they came to be.
        task: ``classification``, or the framework and schedule of a dense-prediction model.
        hub_id: Repository on the Hugging Face hub.
        filename: Name of the file there or at the end of `url`; None where it is not known.
        url: Direct address, for files outside the hub.
        size: Bytes.
        sha256: Hexadecimal digest, or as much of its beginning as is known.
        license: As stated for the weights, else for the repository that releases them.
        source: Where this row was read.
        note: What a user of the file should know.
    """

    family: str
    model: str
    tag: str = "in1k"
    task: str = "classification"
    hub_id: str | None = None
    filename: str | None = None
    url: str | None = None
    size: int | None = None
    sha256: str | None = None
    license: str = NONE_STATED
    source: str = ""
    note: str = ""

    @property
    def location(self) -> str:
        """Address that a browser can open."""
        if self.hub_id:
            return f"https://huggingface.co/{self.hub_id}/resolve/main/{self.filename}"
        return self.url or ""

    @property
    def wired(self) -> bool:
        """Whether ``pretrained=True`` can fetch it: timm needs the name of a file."""
        return self.task == "classification" and self.filename is not None


def _rows() -> Iterator[PublishedFile]:
    for family, entry in document().items():
        shared: dict[str, Any] = dict(entry.get("files", {}))
        for row in shared.pop("rows", ()):
            fields = {"family": family, **shared, **row}
            if "url" in fields:
                fields["url"] = fields["url"].format(**row)
            fields.pop("share", None)  # the part of a url that differs
            yield PublishedFile(**fields)


PUBLISHED: tuple[PublishedFile, ...] = tuple(_rows())


def published_files(model: str) -> list[PublishedFile]:
    """The rows of a model, with or without a tag: ``ravlt_t``, ``l2vit_base.in22k``."""
    name, _, tag = model.partition(".")
    return [row for row in PUBLISHED if row.model == name and (not tag or row.tag == tag)]


def pretrained_source(model: str) -> dict[str, str]:
    """The part of a model's ``pretrained_cfg`` that says where its weights are.

    Args:
        model: Name, with a tag where there are several: ``ravlt_t``, ``l2vit_base.in22k``. Without
            one, the first row of the model.

    Returns:
        ``hf_hub_id`` and ``hf_hub_filename``, or ``url``; and ``license`` where one is stated.
        Empty if no file of the model has a confirmed location that timm can fetch.
    """
    row = next((row for row in published_files(model) if row.wired), None)
    if row is None:
        return {}
    source = {} if row.license == NONE_STATED else {"license": row.license}
    if row.hub_id and row.filename:
        return {"hf_hub_id": row.hub_id, "hf_hub_filename": row.filename, **source}
    assert row.url is not None
    return {"url": row.url, **source}


def published_at(hub_id: str | None, filename: str | None, url: str | None) -> PublishedFile | None:
    """The row of a location, None if it is not one of ours."""
    for row in PUBLISHED:
        if (hub_id and (row.hub_id, row.filename) == (hub_id, filename)) or (
            url and row.url == url and not hub_id
        ):
            return row
    return None


BY_HASH = "SHA-256"


def published_row(path: Path, sha256: str) -> tuple[PublishedFile, str] | None:
    """The row of a published file that this may be a copy of, and what says so.

    The hash, where the row has one; else the name and the size, where it is known; else the name.
    """
    for row in PUBLISHED:
        if row.sha256 and sha256.startswith(row.sha256):
            return row, BY_HASH
    for row in PUBLISHED:
        if row.filename == path.name and row.sha256 is None:
            if row.size is None:
                return row, "file name only"
            return (row, "file name and size") if row.size == path.stat().st_size else None
    return None
