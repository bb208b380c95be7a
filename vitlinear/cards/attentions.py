"""The ``attentions`` command: the attentions of the registry, one a line, or all about one."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vitlinear.cli.parser import Parser
from vitlinear.errors import UserError
from vitlinear.mixers import AttentionDescription, describe_attention, list_attentions
from vitlinear.mixers.description import ORDERS


def main(argv: Sequence[str] | None, prog: str = "vitlinear attentions") -> None:
    """Run ``vitlinear attentions``."""
    parser = Parser(
        prog=prog,
        description="The attentions that `vitlinear.create_attention` makes, one a line; with a "
        "name, all that is known of one.",
    )
    parser.add_argument("name", nargs="?", default=None, metavar="NAME", help="one of them")
    parser.add_argument("--order", choices=ORDERS, default=None, help="of this order only")
    parser.add_argument("--json", action="store_true", help="JSON on standard output")
    args = parser.parse_args(argv)
    if args.name is not None:
        if args.order is not None:
            parser.error("--order is for the list, and a name asks for one attention")
        try:
            chosen = describe_attention(args.name)
        except ValueError as error:
            raise UserError(str(error)) from error
        print(json.dumps(chosen.as_dict(), indent=2) if args.json else about(chosen))
        return
    names = list_attentions(lambda d: args.order in (None, d.order))
    found = [describe_attention(name) for name in names]
    if args.json:
        print(json.dumps([description.as_dict() for description in found], indent=2))
        return
    header = ("attention", "order", "keeps", "cost", "backends", "paper")
    rows = [
        header,
        *((d.name, d.order, keeps(d), d.cost, "/".join(d.backends), d.paper) for d in found),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
    print(
        "keeps, of softmax: + weights at least 0; 1 rows that sum to 1; q effect of the length of"
    )
    print("a query; i different weights for different queries. N tokens, D channels, F features.")


def keeps(description: AttentionDescription) -> str:
    """The properties of softmax that an attention keeps, in letters."""
    letters = {
        "+": description.positive,
        "1": description.rows_sum_to_one,
        "q": description.query_magnitude,
        "i": description.injective,
    }
    return "".join(letter if kept else "." for letter, kept in letters.items())


def about(description: AttentionDescription) -> str:
    """All about an attention, in lines."""
    order = {
        "free": "a permutation of the tokens permutes the output",
        "local": "the grid decides, by windows, blocks or convolutions",
        "directional": "scans run along the grid",
    }[description.order]
    kept = {
        "weights at least 0": description.positive,
        "rows that sum to 1": description.rows_sum_to_one,
        "effect of the length of a query": description.query_magnitude,
        "different weights for different queries": description.injective,
    }
    names = [name for name, yes in kept.items() if yes]
    rows = {
        "formula": description.formula,
        "paper": f"{description.title} ({description.paper}, {description.year})",
        "ours": description.origin,
        "cost": f"{description.cost} multiply-adds of a head",
        "state": f"{description.state} numbers of a head",
        "order": f"{description.order}: {order}",
        "keeps": ", ".join(names) or "nothing of softmax",
        "positions": f"rotary ones act {description.turns}",
        "backends": ", ".join(description.backends),
        "limit": f"{description.most_tokens} tokens" if description.quadratic else "",
    }
    lines = [description.name, *(f"  {key:<10}{text}" for key, text in rows.items() if text)]
    for name, option in description.options.items():
        lines.append(f"  option    {name} = {option.default!r} ({option.range}): {option.meaning}")
    for change in description.changes:
        values = " or ".join(map(str, change.values))
        then = ", ".join(f"{field} is {words(value)}" for field, value in change.fields.items())
        lines.append(f"  then      with {change.option} {values}: {then}")
    return "\n".join(lines)


def words(value: object) -> str:
    """A value of a description in words."""
    return "/".join(value) if isinstance(value, tuple) else str(value)
