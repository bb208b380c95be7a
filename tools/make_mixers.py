"""Make docs/mixers.md from the registry of attentions and what was measured of them.

    python tools/make_mixers.py            # write the page
    python tools/make_mixers.py --check    # write nothing; exit 1 if it is out of date

Measurements are read where they are: ``benchmarks/results/mixers_cpu.json`` of
``benchmarks/mixers.py``, and ``fashion_mnist_mixers_cpu.json`` of ``benchmarks/fashion_mnist.py
--mixers``. What was not measured says so.
"""

import argparse
import json
import sys
from pathlib import Path
from string import Template
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.mixers import DIM, HEADS, SIDES, crossover, specs  # noqa: E402
from vitlinear.cards.attentions import keeps  # noqa: E402
from vitlinear.files import write_atomically  # noqa: E402
from vitlinear.mixers import (  # noqa: E402
    AttentionDescription,
    describe_attention,
    list_attentions,
    make_mixer,
    split_spec,
)

PAGE = ROOT / "docs" / "mixers.md"
RESULTS = ROOT / "benchmarks" / "results"
SPEED = RESULTS / "mixers_cpu.json"
FIGURE = RESULTS / "mixers_cpu.svg"
STUDY = RESULTS / "fashion_mnist_mixers_cpu.json"
SYSTEMS = ROOT / "tools" / "mixer_systems.yaml"
TEMPLATE = ROOT / "tools" / "mixers_page.md"
MISSING = "not yet measured"


def cell(text: str) -> str:
    """Text as a cell of a Markdown table."""
    return text.replace("|", "\\|")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def reference(description: AttentionDescription) -> str:
    """The paper as a link, where it has a number of arXiv."""
    name = f"{description.title}, {description.year}"
    kind, _, number = description.paper.partition(":")
    if kind != "arXiv":
        return f"{name} ({description.paper})"
    return f"[{name}](https://arxiv.org/abs/{number})"


def parameters(name: str) -> int:
    """Parameters of a mixer."""
    mixer = make_mixer(name, DIM, HEADS, device="meta")
    return sum(parameter.numel() for parameter in mixer.parameters())


def formulas(found: list[AttentionDescription]) -> str:
    """The table of what the attentions compute."""
    header = ["attention", "output", "cost", "state", "parameters", "order", "keeps", "runs on"]
    rows = [
        [
            f"`{d.name}`", f"`{d.formula}`", d.cost, d.state, f"{parameters(d.name):,}", d.order,
            f"`{keeps(d)}`", "kernels" if "triton" in d.backends else "eager",
        ]
        for d in found
    ]  # fmt: skip
    return table(header, rows)


def papers(found: list[AttentionDescription]) -> str:
    """The table of papers, and of what is ours."""
    rows = [[f"`{d.name}`", reference(d), d.origin] for d in found]
    return table(["attention", "paper", "what is ours"], rows)


def options(found: list[AttentionDescription]) -> str:
    """The table of options."""
    rows = [
        [f"`{d.name}`", f"`{name}`", repr(option.default), option.range, option.meaning]
        for d in found
        for name, option in d.options.items()
    ]
    return table(["attention", "option", "default", "range", "meaning"], rows)


def read(path: Path) -> dict[str, Any] | None:
    """A file of results; None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def accuracy(study: dict[str, Any] | None, name: str) -> str:
    """Top-1 of an attention in the study: the mean over its seeds."""
    rows = [] if study is None else study["summary"]
    found = next((row for row in rows if row["attention"] == name), None)
    if found is None:
        return MISSING
    if "mean" not in found:
        return "failed"
    spread = f" ± {found['sd']:.1f}" if found["sd"] is not None else ", one seed"
    return f"{found['mean']:.1f}{spread}"


def crossing(records: list[dict[str, Any]], name: str) -> str:
    """Tokens from which on an attention is faster than softmax, to two digits."""
    if name == "softmax":
        return ""
    tokens = crossover(records, name)
    if tokens is None:
        return "never here"
    least = min(row["tokens"] for row in records)
    return f"under {least}" if tokens <= least else f"{float(f'{tokens:.2g}'):.0f}"


def measured(speed: dict[str, Any] | None, study: dict[str, Any] | None) -> str:
    """The table of what was measured."""
    sizes = [side * side for side in SIDES]
    rows = []
    records = [] if speed is None else speed["rows"]
    for name, spec in sorted(specs().items()):
        most = describe_attention(split_spec(spec)[0]).most_tokens
        of = {r["tokens"]: r for r in records if r["attention"] == name}
        row = [f"`{name}`", accuracy(study, name)]
        for size in sizes:
            if most is not None and size > most:
                row.append("refused")
            elif size in of:
                row.append(f"{1e3 / of[size]['forward_ms']:.3g}, {of[size]['peak_MiB']:.0f}")
            else:
                row.append(MISSING)
        row.append(crossing(records, name) if of else MISSING)
        rows.append(row)
    columns = [f"{size} tokens: maps/s, MiB" for size in sizes]
    return table(["attention", "top-1 (%)", *columns, "faster from, tokens"], rows)


def systems() -> str:
    """The table of systems of the literature.

    Raises:
        ValueError: A row says neither where a system lives nor why not.
    """
    there = set(list_attentions())
    rows = []
    for system in yaml.safe_load(SYSTEMS.read_text()):
        names = [f"`{name}`" for name in system["here"] if name in there]
        gone = [f"`{name}`" for name in system["here"] if name not in there]
        if not system["here"] and not system["note"]:
            raise ValueError(f"{system['system']} has neither a place nor a reason")
        place = ", ".join(names) if not gone else f"not yet here: {', '.join(gone)}"
        if names and gone:
            place = f"{', '.join(names)}; {place}"
        rows.append([system["system"], place or "no place", system["note"]])
    return table(["system", "here", "how, or why not"], rows)


def machine(speed: dict[str, Any] | None) -> str:
    """A line on the machine that was measured, and the figure, where there are some."""
    text = ""
    if speed is not None:
        text += f"{speed['machine']}; torch {speed['torch']}; commit {speed['commit']}.\n\n"
    if FIGURE.exists():
        text += "![Time against tokens](../benchmarks/results/mixers_cpu.svg)\n\n"
    return text


def render() -> str:
    """The page."""
    found = [describe_attention(name) for name in list_attentions()]
    speed, study = read(SPEED), read(STUDY)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        count=len(found),
        dim=DIM,
        heads=HEADS,
        formulas=formulas(found),
        options=options(found),
        measured=machine(speed) + measured(speed, study),
        papers=papers(found),
        systems=systems().rstrip("\n"),
    )


def main(argv: list[str] | None = None) -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    args = parser.parse_args(argv)
    text = render()
    if args.check:
        current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        if not current:
            print("docs/mixers.md is out of date: run python tools/make_mixers.py")
        return 0 if current else 1
    write_atomically(PAGE, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
