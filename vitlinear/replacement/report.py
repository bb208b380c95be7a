"""The report on which attentions of a model were replaced."""

from __future__ import annotations

from typing import NamedTuple


class Replacement(NamedTuple):
    """One attention of a model: replaced, or refused and why.

    Attributes:
        block: Number of its block, in timm's order.
        name: Path of the module.
        was: Class of timm's that was there.
        attention: Name of the attention that is there now; None if it was refused.
        dropped: Parts of the one that was there that are not there now, of `kinds.PARTS` and
            ``attn_drop``, dropout of the weights, which no mixer has.
        reason: Why it was refused; empty if it was not.
    """

    block: int
    name: str
    was: str
    attention: str | None
    dropped: tuple[str, ...]
    reason: str


class ReplacementReport(tuple[Replacement, ...]):
    """The attentions that were asked for, in order; prints as a table."""

    @property
    def replaced(self) -> tuple[Replacement, ...]:
        """Those that were replaced."""
        return tuple(row for row in self if row.attention is not None)

    @property
    def refused(self) -> tuple[Replacement, ...]:
        """Those that were not."""
        return tuple(row for row in self if row.attention is None)

    def __str__(self) -> str:
        header = ("block", "module", "was", "is", "without", "reason")
        rows = [
            (
                str(row.block),
                row.name,
                row.was,
                row.attention or "as it was",
                ", ".join(row.dropped),
                row.reason,
            )
            for row in self
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        )
