"""The ``list`` command: the models, one a line, with what their cards say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vitlinear.cli.parser import Parser
from vitlinear.errors import UserError, did_you_mean
from vitlinear.facts import families, family_of
from vitlinear.models import our_models

from .info import describe
from .render import giga, mega


def main(argv: Sequence[str] | None, prog: str = "vitlinear list") -> None:
    """Run ``vitlinear list``."""
    parser = Parser(prog=prog, description="The models of this package, one a line.")
    parser.add_argument("--family", default=None, metavar="F", help=", ".join(families()))
    parser.add_argument("--all", action="store_true", help="also test_*, for tests and small data")
    parser.add_argument("--json", action="store_true", help="JSON on standard output")
    args = parser.parse_args(argv)
    if args.family is not None and args.family not in families():
        raise UserError(
            f"unknown family '{args.family}'{did_you_mean(args.family, families())}; "
            f"there are {', '.join(families())}"
        )
    models = [
        describe(name, count_parameters=False)
        for name in our_models(tests=args.all)
        if args.family in (None, family_of(name).name)
    ]
    if args.json:
        print(json.dumps(models, indent=2))
        return
    header = ("model", "family", "params", "GMACs", "input", "top-1", "weights", "attention")
    rows = [header, *(_row(model) for model in models)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[-1]]).rstrip())
    if any("*" in row[5] for row in rows):
        print("* published in a secondary source only; `vitlinear info NAME` says which")


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    published, macs = model["published"], model["multiply_adds"]
    accuracy = ""
    if published:
        mark = "*" if published["source"].startswith("secondary") else ""
        accuracy = "/".join(f"{value}" for value in published["imagenet_1k_top1"].values()) + mark
    weights = model["weights"]
    kind = "fetched" if any(row["pretrained"] for row in weights) else "link" if weights else ""
    return (
        model["model"],
        model["family"],
        mega(model["parameters"]) if model["parameters"] else "",
        giga(macs["total"]) if macs else "",
        "x".join(str(side) for side in model["input_size"][1:]),
        accuracy,
        kind,
        model["attention"],
    )
