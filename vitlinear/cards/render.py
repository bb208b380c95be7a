"""Model cards: Markdown with the YAML header of the Hugging Face hub."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import yaml

from vitlinear.facts import PUBLISHED, Family, ModelFacts, PublishedFile, convention, counts
from vitlinear.models import our_models

COMMAND = "python tools/make_cards.py"


def family_models(family: Family) -> list[str]:
    """Registered models of a family in the order of the facts file, siblings after them."""
    names = [name for name in our_models() if family.has(name)]
    order = {name: index for index, name in enumerate(family.models)}

    def place(name: str) -> tuple[bool, bool, int]:
        base = name.removesuffix("_linear")
        return name.startswith("test_"), name not in order, order.get(base, len(order))

    return sorted(names, key=place)


def _wrap(text: str, bullet: bool = False) -> str:
    """A paragraph, or an item of a list, in lines of 100 columns."""
    return textwrap.fill(
        text,
        width=100,
        initial_indent="- " if bullet else "",
        subsequent_indent="  " if bullet else "",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join('---' for _ in header)} |"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _header(family: Family) -> list[str]:
    fields: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "license": family.hub_license,
        "datasets": ["imagenet-1k"],
        "tags": [
            "image-classification",
            "timm",
            "vitlinear",
            "linear-attention",
            f"arxiv:{family.paper['arxiv']}",
        ],
    }
    if not any(model.published for model in family.models.values()):
        del fields["datasets"]  # nobody states what was trained on it
    return ["---", yaml.safe_dump(fields, sort_keys=False).rstrip(), "---"]


def giga(value: float) -> str:
    """A count in G, with three decimals."""
    return f"{value / 1e9:.3f}"


def mega(value: float) -> str:
    """A count in M, with two decimals."""
    return f"{value / 1e6:.2f}M"


def top1(facts: ModelFacts) -> str:
    """Published accuracies of a model in one cell; empty if there are none."""
    if facts.published is None:
        return ""
    items = facts.published.top1.items()
    mark = " (secondary)" if facts.published.secondary else ""
    return (
        ", ".join(f"{value}{'' if tag == 'in1k' else f' ({tag})'}" for tag, value in items) + mark
    )


def _variants(family: Family) -> list[str]:
    rows = []
    for name in family_models(family):
        facts, counted = family.model(name), counts()[name]
        published = facts.published
        _, height, width = counted["input_size"]
        params, macs = (published.params, published.macs) if published else (None, None)
        rows.append(
            (
                f"`{name}`",
                facts.attention,
                mega(counted["params"]),
                f"{params}M" if params else "",
                f"{height}x{width}",
                giga(counted["total"]),
                giga(counted["projections"]),
                giga(counted["attention"]),
                f"{macs}" if macs else "",
                convention(macs, counted) if macs else "",
                top1(facts),
            )
        )
    header = (
        "model", "attention by stage", "parameters", "parameters, published", "input",
        "10^9 multiply-adds, total", "of projections", "of attention", "published",
        "what the published figure counts", "ImageNet-1K top-1 in %, published",
    )  # fmt: skip
    lines = _table(header, rows)
    lines += [
        "Parameters, and multiply-adds of one image, were counted on these models with fvcore.",
        "*Projections* are convolutions and linear layers. *Attention* is the matrix products of",
        "attention. The total adds norms and pooling. A published figure is taken to count",
        "projections or the total, whichever it is nearer to; neither, if both are more than 3%",
        "away. Accuracies have not been measured here. An empty field: nothing is published.",
        "",
    ]
    return lines


def _hash(row: PublishedFile) -> str:
    if row.sha256 is None:
        return ""
    return f"`{row.sha256}`" if len(row.sha256) == 64 else f"`{row.sha256}`..."


def _weights(family: Family) -> list[str]:
    lines = ["## Weights", "", _wrap(family.weights_license), ""]
    files = [row for row in PUBLISHED if row.family == family.name]
    rows = [
        (
            f"`{row.model}.{row.tag}`",
            f"[{row.filename or 'share link'}]({row.location})",
            f"{row.size:,}" if row.size else "",
            _hash(row),
            row.license,
            "yes" if row.wired else "no",
        )
        for row in files
        if row.task == "classification"
    ]
    if rows:
        header = ("weights", "file", "bytes", "SHA-256", "licence", "`pretrained=True`")
        lines += _table(header, rows)
        if any("" in row for row in rows):
            lines += ["An empty field: size or hash of the file is not known.", ""]
    dense = [row for row in files if row.task != "classification"]
    if dense:
        hub = f"https://huggingface.co/{dense[0].hub_id}"
        place = f"in the [same repository]({hub})" if dense[0].hub_id else "as share links"
        lines += [
            _wrap(
                f"Detectors and segmentors with these models as backbones, {place}. "
                "`vitlinear convert FILE OUT.pth` makes them fit mmdet 3 and mmsegmentation 1. "
                "That was tested on files made in their layout; none of these has been read here."
            ),
            "",
        ]
        for task in dict.fromkeys(row.task for row in dense):
            names = ", ".join(
                f"`{row.filename}`" if row.filename else f"[{row.model}]({row.location})"
                for row in dense
                if row.task == task
            )
            lines.append(_wrap(f"{task.partition(': ')[2]}: {names}", bullet=True))
        lines.append("")
    notes = [
        _wrap(f"`{row.filename}`: {row.note}.", bullet=True)
        for row in files
        if row.note and row.filename
    ]
    return [*lines, *notes, *([""] if notes else [])]


def _usage(family: Family) -> list[str]:
    names = family_models(family)
    wired = [row for row in PUBLISHED if row.family == family.name and row.wired]
    name = wired[0].model if wired else names[0]
    lines = [
        "## Use",
        "",
        "```python",
        "import timm",
        "import vitlinear  # registers the models",
        "",
    ]
    if wired:
        lines.append(f'model = timm.create_model("{name}", pretrained=True)')
    else:
        lines.append(f'model = timm.create_model("{name}")')
    backbone = f'backbone = timm.create_model("{name}", features_only=True)'
    small = f'small = timm.create_model("{name}", num_classes=10, in_chans=1)'
    lines += [backbone, small, "```", ""]
    has_files = any(row.family == family.name for row in PUBLISHED)
    if has_files or family.code:
        lines += [
            "A checkpoint of the authors' code loads as it is, and no code in it is executed. PATH",
            "is the file on your disk. Or convert it to safetensors first:",
            "",
            "```python",
            f'timm.create_model("{name}", pretrained=True, pretrained_cfg_overlay=dict(file=PATH))',
            "```",
            "",
            "    vitlinear convert PATH OUT.safetensors",
            "",
            'In Python, `vitlinear.load("OUT.safetensors")` then gives the model without its name.',
            "",
        ]
    return lines


def at_most(value: float) -> str:
    """The power of ten that a small number does not exceed."""
    return f"1e{math.ceil(math.log10(value))}" if value > 0 else "0"


def _measured(family: Family) -> list[str]:
    lines = ["## Measured here", ""]
    agreements = [
        (family.model(name).released, f"`{name}`", size, at_most(difference))
        for name in family_models(family)
        for size, difference in counts()[name].get("agreement", {}).items()
    ]
    if agreements:
        lines += [
            "Logits were compared with those of the authors' code, with the same random weights in",
            "both, in float64 on a CPU. The norm of the difference, divided by the norm of the",
            "logits, is at most:",
            "",
        ]
        rows = [(name, released or "", size, bound) for released, name, size, bound in agreements]
        lines += _table(("model", "the authors' name", "input", "difference"), rows)
    else:
        lines += ["Parameters and multiply-adds only.", ""]
    lines += ["Accuracy has not been measured here.", ""]
    return lines


def render(family: Family) -> str:
    """The card of a family."""
    paper = family.paper
    arxiv = f"[arXiv:{paper['arxiv']}](https://arxiv.org/abs/{paper['arxiv']})"
    code = f" Code of the authors: <{family.code}>." if family.code else ""
    lines = [
        *_header(family),
        "",
        f"<!-- Made by `{COMMAND}` from the registry and vitlinear/facts/facts.yaml. -->",
        "",
        f"# {family.title}",
        "",
        _wrap(family.summary),
        "",
        _wrap(
            f"From *{paper['title']}* ({arxiv}, {paper['venue']}).{code} The models here were "
            "written from the definition and share no code with it."
        ),
        "",
        "## What the attention computes",
        "",
        "Of each head, for queries, keys and values q, k, v of N tokens:",
        "",
        *(f"    {line}" for line in family.mechanism.splitlines()),
        "",
        "## Where softmax stays",
        "",
        _wrap(family.stages),
        "",
        "## Variants",
        "",
        *_variants(family),
    ]
    used = {model.published.source for model in family.models.values() if model.published}
    if used:
        lines += ["Sources of the published figures:", ""]
        for name in family.models:
            facts = family.models[name].published
            if facts and facts.source in used:
                used.remove(facts.source)
                users = [
                    f"`{key}`"
                    for key, model in family.models.items()
                    if model.published and model.published.source == facts.source
                ]
                whose = (
                    "all"
                    if len(users)
                    == sum(model.published is not None for model in family.models.values())
                    else ", ".join(users)
                )
                lines.append(_wrap(f"{whose}: {facts.source}.", bullet=True))
        lines.append("")
    lines += ["## What to know", "", *(_wrap(note, bullet=True) for note in family.notes), ""]
    lines += [*_weights(family), *_usage(family), *_measured(family)]
    return "\n".join(lines).rstrip() + "\n"
