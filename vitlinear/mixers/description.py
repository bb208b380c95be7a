"""Descriptions of attentions that programs can read: what a mixer computes, costs and takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from vitlinear.errors import did_you_mean

# ``free``: a permutation of the tokens permutes the output. ``local``: the grid decides, by
# windows, blocks or convolutions. ``directional``: scans run along the grid.
Order = Literal["free", "local", "directional"]
ORDERS: tuple[Order, ...] = ("free", "local", "directional")


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of an attention.

    Attributes:
        default: Value where none is given; its type is that of the option, unless `kind` says so.
        meaning: In a few words.
        low: Least number; None for no bound.
        high: Greatest number; None for no bound.
        choices: Words that it may be; empty for any.
        kind: Type of the values; None for that of the default.
    """

    default: Any
    meaning: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    kind: type | None = None

    @property
    def type(self) -> type:
        """Type of the values: bool, int, float or str."""
        return type(self.default) if self.kind is None else self.kind

    @property
    def range(self) -> str:
        """The values that it may have, in words."""
        if self.choices:
            return ", ".join(self.choices)
        if self.type is bool:
            return "True, False"
        if self.low is None and self.high is None:
            return f"any {self.type.__name__}"
        if self.high is None:
            return f"{self.type.__name__}, at least {self.low}"
        if self.low is None:
            return f"{self.type.__name__}, at most {self.high}"
        return f"{self.type.__name__} from {self.low} to {self.high}"

    def has_type(self, value: Any) -> bool:
        """Whether a value has the type of the option; True is an int, and no number here."""
        return type(value) is self.type

    def check(self, owner: str, name: str, value: Any) -> Any:
        """The value, if it is one of these.

        Args:
            owner: Name of the attention.
            name: Name of the option.
            value: What was given.

        Raises:
            ValueError: It is not; one line.
        """
        if value is None and self.default is None:
            return None
        if self.type is float and type(value) is int:
            value = float(value)
        if not self.has_type(value):
            raise ValueError(f"{owner}: {name} must be {self.range}, got {value!r}")
        if self.choices and value not in self.choices:
            near = did_you_mean(value, self.choices)
            raise ValueError(f"{owner}: {name} must be one of {self.range}, got {value!r}{near}")
        low, high = self.low, self.high
        # A comparison that NaN fails too.
        if not ((low is None or value >= low) and (high is None or value <= high)):
            raise ValueError(f"{owner}: {name} must be {self.range}, got {value!r}")
        return value


@dataclasses.dataclass(frozen=True)
class Change:
    """A description differs so where an option has one of some values.

    Attributes:
        option: Its name.
        values: Of the option.
        fields: Fields of `AttentionDescription` with what they are then.
    """

    option: str
    values: tuple[Any, ...]
    fields: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class AttentionDescription:
    """An attention as the registry knows it.

    It is true of the default options; `with_options` has that of others. In formulas and costs, N
    is the number of tokens, D that of channels of a head, F that of features.

    Attributes:
        name: That of the paper, in lower case.
        formula: Output of a query, in one line of text.
        paper: ``arXiv:...``, or another reference.
        title: Of the paper.
        year: Of its first version.
        cost: Multiply-adds of a head, such as ``N F D``.
        state: Numbers that a head keeps of all tokens, such as ``F (D + 1)``.
        order: One of `ORDERS`.
        positive: Whether all weights are at least 0, as long as learned scales of the output are.
        rows_sum_to_one: Whether the weights of a query add up to 1, without rotary positions.
        query_magnitude: Whether the weights of a query change with its length, not its direction
            alone.
        injective: Whether different queries have different weights, as far as is proven.
        backends: Which can run it: ``eager``, ``library``, ``triton``.
        options: By name.
        turns: Where rotary positions act: ``inside``, on features, as the mixer does itself;
            ``before``, on queries and keys; ``nowhere``: the mixer has positions of its own.
        most_tokens: Number of tokens above which it refuses; None for a cost that is linear in N.
        origin: What is ours and not the paper's, in a sentence; empty for nothing.
        needs_input: Whether it reads the input of the layer beside q, k and v.
        changes: What other options change.
    """

    name: str
    formula: str
    paper: str
    title: str
    year: int
    cost: str
    state: str
    order: Order
    positive: bool
    rows_sum_to_one: bool
    query_magnitude: bool
    injective: bool
    backends: tuple[str, ...] = ("eager",)
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    turns: Literal["inside", "before", "nowhere"] = "before"
    most_tokens: int | None = None
    origin: str = ""
    needs_input: bool = False
    changes: tuple[Change, ...] = ()

    @property
    def quadratic(self) -> bool:
        """Whether the cost grows with the square of N."""
        return self.most_tokens is not None

    def check_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options with their values.

        Args:
            given: Some of them.

        Raises:
            ValueError: One is unknown or out of range; one line, with the nearest match.
        """
        for name in given:
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                near = did_you_mean(name, self.options)
                raise ValueError(f"{self.name} has no option {name!r}{near}; it has: {known}")
        return {
            name: option.check(self.name, name, given.get(name, option.default))
            for name, option in self.options.items()
        }

    def with_options(self, options: Mapping[str, Any]) -> AttentionDescription:
        """The description of the attention with these options.

        Args:
            options: Some or all of them, by name.

        Raises:
            ValueError: One is unknown or out of range; one line.
        """
        values = self.check_options(options)
        fields: dict[str, Any] = {}
        for change in self.changes:
            if values[change.option] in change.values:
                fields.update(change.fields)
        return dataclasses.replace(self, **fields)

    def check_length(self, length: int) -> None:
        """Refuse more tokens than a quadratic attention is meant for.

        Raises:
            ValueError: There are more.
        """
        if self.most_tokens is not None and length > self.most_tokens:
            raise ValueError(
                f"{self.name} costs N^2 and takes at most {self.most_tokens} tokens, got {length}; "
                "give it smaller maps or windows, or take an attention of linear cost"
            )

    def as_dict(self) -> dict[str, Any]:
        """All of it in the types of JSON."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["options"] = {
            name: {
                "type": option.type.__name__,
                "default": option.default,
                "low": option.low,
                "high": option.high,
                "choices": list(option.choices),
                "meaning": option.meaning,
            }
            for name, option in self.options.items()
        }
        fields["backends"] = list(self.backends)
        fields["changes"] = [
            {"option": change.option, "values": list(change.values), **change.fields}
            for change in self.changes
        ]
        return fields
