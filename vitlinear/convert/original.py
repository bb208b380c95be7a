"""A checkpoint file that is to be converted: what is in it, and where it comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import vitlinear
from vitlinear.checkpoints.download import digest, ensure_downloaded
from vitlinear.checkpoints.read import read_checkpoint
from vitlinear.checkpoints.translate import BACKBONE, common_prefixes, layout_of, without
from vitlinear.checkpoints.unwrap import find_weights
from vitlinear.errors import UserError
from vitlinear.facts import PUBLISHED, PublishedFile, published_row

from .recognise import Fit, keys_report


@dataclasses.dataclass(frozen=True)
class OriginalFile:
    """A checkpoint file.

    Attributes:
        path: Of the file.
        sha256: Of the file.
        checkpoint: All that is in it.
        where: Keys that lead to the weights.
        prefix: What a wrapper has put before every key of theirs; empty if there is none.
        weights: Those, without it.
        match: The row of a published file that this may be a copy of, and what says so.
    """

    path: Path
    sha256: str
    checkpoint: Mapping[str, Any]
    where: tuple[str, ...]
    prefix: str
    weights: Mapping[str, Tensor]
    match: tuple[PublishedFile, str] | None

    @classmethod
    def read(cls, path: Path) -> OriginalFile:
        """Read a file.

        Raises:
            UserError: It is not there, is damaged, or holds no weights.
        """
        checkpoint = read_checkpoint(path)
        try:
            where, weights = find_weights(checkpoint)
        except ValueError as error:
            raise UserError(f"checkpoint {path} cannot be used: {error}") from error
        prefix = _wrapper_prefix(weights)
        weights = without(prefix, weights)
        sha256 = digest(path)
        return cls(path, sha256, checkpoint, where, prefix, weights, published_row(path, sha256))

    @property
    def layout(self) -> str:
        """Whose keys these are."""
        mapping = layout_of(self.weights)
        return mapping.name if mapping else "vitlinear"

    def metadata(self, model: str, row: PublishedFile | None) -> dict[str, str]:
        """Metadata that a converted file holds about this one.

        Args:
            model: Name of the model, or of the backbone.
            row: Of `match`, if the file is what the row says.
        """
        metadata = {
            "source_file": self.path.name,
            "source_sha256": self.sha256,
            "mapping": self.layout,
            "model": model,
            "converted_by": f"vitlinear {vitlinear.__version__}",
        }
        if row is not None and self.match is not None:
            metadata |= {"license": row.license, "published_at": row.location}
            metadata["matched_by"] = self.match[1]
        return metadata

    def report(self, found: Fit, metadata: Mapping[str, str], *lines: str) -> list[str]:
        """Lines for people: the source, its layout, `lines` about the model, keys, licence."""
        left_out = [str(key) for key in self.checkpoint if key not in self.where[:1]]
        under = f"under {'.'.join(self.where)}" if self.where else "bare"
        if self.prefix:
            under += f", without '{self.prefix}', which every key begins with"
        license_ = metadata.get("license", "not known")
        if "matched_by" in metadata:
            how = metadata["matched_by"]
            license_ += f" (that of {metadata['published_at']}, matched by {how})"
        return [
            f"source        {self.path} (SHA-256 {self.sha256})",
            f"weights       {under}"
            + (f"; left out: {', '.join(left_out)}" if self.where and left_out else ""),
            f"layout        {self.layout}",
            *lines,
            keys_report(found),
            f"licence       {license_}",
        ]


def _wrapper_prefix(weights: Mapping[str, Tensor]) -> str:
    """The prefix that a program which held a model or a detector put before every key, or nothing.

    A model of this package has several parts, whose keys have no beginning in common. A detector
    may be saved without its heads; its backbone has no classifier.
    """
    for prefix in reversed(common_prefixes(weights)):
        whole = any(key.startswith(f"{prefix}head.") for key in weights)
        if whole or BACKBONE not in prefix:
            return prefix
    return ""


def local_file(source: str) -> Path:
    """The file that a path or an address stands for; what is published is fetched and checked.

    Raises:
        UserError: The address is none of a published file, or cannot be fetched.
    """
    if not source.startswith(("https://", "http://")):
        return Path(source).expanduser()
    row = next((row for row in PUBLISHED if row.filename and row.location == source), None)
    if row is None:
        raise UserError(
            f"{source} is not the address of a published file that this version knows: download "
            "it yourself, and give the file"
        )
    try:
        path = ensure_downloaded(
            {"hf_hub_id": row.hub_id, "hf_hub_filename": row.filename, "url": row.url}
        )
    except OSError as error:
        raise UserError(str(error)) from error
    assert path is not None
    return path
