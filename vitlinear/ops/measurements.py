"""Measured times of the kernels and of the formula, and the choice that follows from them.

A measurement counts for its own GPU only. `vitlinear tune` makes them; its ``--export`` writes a
file that can be committed to the folder `SEEDS`, which ships what others have measured. The user's
own measurements win over it. It is empty: nobody has measured the kernels on a GPU yet.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .gpu import Gpu
from .workload import Kind

SEEDS = Path(__file__).with_name("seeds")


class Measurement(NamedTuple):
    """The times of one call, in milliseconds; forward and backward in training.

    Attributes:
        mechanism: Key in `MECHANISMS`.
        dtype: Name of the type.
        head_dim: D.
        terms: Names of the terms that there were.
        training: Whether a backward pass was part of it.
        batch: B.
        length: N.
        heads: h.
        triton_ms: Of the kernels.
        eager_ms: Of the eager formula.
        compiled_ms: Of the eager formula under `torch.compile`; None if it was not measured.
        value_dim: Channels of a value; 0 for D.
        full_width: Whether rotary tables turned all heads side by side.
        tf32: Whether float32 products were in TF32.
    """

    mechanism: str
    dtype: str
    head_dim: int
    terms: tuple[str, ...]
    training: bool
    batch: int
    length: int
    heads: int
    triton_ms: float
    eager_ms: float
    compiled_ms: float | None = None
    value_dim: int = 0
    full_width: bool = False
    tf32: bool = False

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Measurement:
        """The measurement that a row of a file holds.

        Raises:
            ValueError: A value is missing, unknown or of another type.
        """
        try:
            found = cls(**{**row, "terms": tuple(row["terms"])})
            times = [float(found.triton_ms), float(found.eager_ms), float(found.compiled_ms or 1)]
            int(found.tokens)
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a measurement: {error}") from error
        if not all(0 < time < math.inf for time in times):
            raise ValueError("not a measurement: times that are not above 0")
        return found

    @property
    def tokens(self) -> int:
        """Tokens of all heads and samples, B N h."""
        return self.batch * self.length * self.heads

    def speedup(self, compiling: bool) -> float:
        """The factor by which the kernels are faster than the formula in their place."""
        other = self.compiled_ms if compiling and self.compiled_ms else self.eager_ms
        return other / self.triton_ms

    def is_of(self, kind: Kind) -> bool:
        """Whether it is about calls of this kind."""
        same = self.mechanism, self.head_dim, self.terms, self.training
        others = self.value_dim, self.full_width, self.tf32
        return (
            same == (kind.mechanism, kind.head_dim, kind.terms, kind.training)
            and others == (kind.value_dim, kind.full_width, kind.tf32)
            and self.dtype == str(kind.dtype).removeprefix("torch.")
        )


class Seeds(NamedTuple):
    """The content of shipped files for a GPU."""

    rows: tuple[Measurement, ...]
    blocks: dict[str, list[int]]


@functools.cache
def seeds(name: str) -> Seeds:
    """The measurements and block sizes that ship for a GPU of this name."""
    rows: list[Measurement] = []
    blocks: dict[str, list[int]] = {}
    for path in sorted(SEEDS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["gpu"]["name"] == name:
            rows += [Measurement.of(row) for row in content["rows"]]
            blocks.update(content["blocks"])
    return Seeds(tuple(rows), blocks)


class Step(NamedTuple):
    """From so many tokens on, of all heads and samples, the kernels are faster or not."""

    tokens: int
    faster: bool
    reason: str


def steps(rows: Iterable[Measurement], kind: Kind, compiling: bool, whose: str) -> list[Step]:
    """The verdict of measurements on calls of a kind, for more and more tokens.

    Args:
        rows: Measurements on this GPU.
        kind: The kind of call.
        compiling: Whether `torch.compile` makes a program of the formula.
        whose: Where the rows come from, for the reason.
    """
    found = {row.tokens: row for row in rows if row.is_of(kind)}
    than = "compiled eager" if compiling else "eager"
    return [
        Step(
            tokens,
            row.speedup(compiling) > 1,
            f"{row.speedup(compiling):.2g} times the speed of {than} at "
            f"{row.batch} x {row.length} x {row.heads}, {whose}",
        )
        for tokens, row in sorted(found.items())
    ]


def as_seeds(
    gpu: Gpu, rows: Iterable[Measurement], blocks: Mapping[str, list[int]]
) -> dict[str, Any]:
    """The content of a file of `SEEDS`."""
    return {"gpu": gpu._asdict(), "rows": [row._asdict() for row in rows], "blocks": dict(blocks)}
