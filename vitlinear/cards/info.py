"""The ``info`` command: what the model card says of one model, in a terminal."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import timm
from timm.models import is_model, split_model_name_tag

from vitlinear.cli.parser import Parser
from vitlinear.errors import UserError, did_you_mean
from vitlinear.facts import convention, counts, families, family_of, published_files
from vitlinear.models import input_size, num_parameters, on_meta, our_models

from .render import giga, mega


def describe(model: str, count_parameters: bool = True) -> dict[str, Any]:
    """Put all that is known of a model into one object.

    Args:
        model: Registered name; with a tag, of its published files and results that one alone.
        count_parameters: Ask the model itself, which takes a tenth of a second.
    """
    name, tag = split_model_name_tag(model)
    family = family_of(name)
    facts, counted = family.model(name), counts().get(name, {})
    files = [row for row in published_files(model) if row.task == "classification"]
    published = facts.published
    cfg = timm.get_pretrained_cfg(model)
    assert cfg is not None
    return {
        "model": model,
        "family": family.name,
        "attention": facts.attention,
        "note": facts.note,
        "released_as": facts.released,
        "input_size": list(input_size(model)),
        "classes": cfg.num_classes,
        "parameters": num_parameters(on_meta(model)) if count_parameters else counted.get("params"),
        "multiply_adds": {
            part: counted[part] for part in ("total", "projections", "attention", "norms")
        }
        if counted
        else None,
        "published": published
        and {
            "parameters_m": published.params,
            "multiply_adds_g": published.macs,
            "multiply_adds_count": convention(published.macs, counted)
            if counted and published.macs
            else None,
            "imagenet_1k_top1": {
                key: value for key, value in published.top1.items() if tag in ("", key)
            },
            "source": published.source,
        },
        "agreement_with_released_code": counted.get("agreement"),
        "weights": [
            {
                "name": f"{name}.{row.tag}",
                "location": row.location,
                "bytes": row.size,
                "sha256": row.sha256,
                "license": row.license,
                "pretrained": row.wired,
            }
            for row in files
        ],
        "paper": {**family.paper, "code": family.code},
    }


def main(argv: Sequence[str] | None, prog: str = "vitlinear info") -> None:
    """Run ``vitlinear info``."""
    parser = Parser(prog=prog, description="What is known of a model.")
    parser.add_argument("model", metavar="NAME", help="`vitlinear list --all` prints all names")
    parser.add_argument("--json", action="store_true", help="JSON on standard output")
    args: argparse.Namespace = parser.parse_args(argv)
    check_name(args.model)
    model = describe(args.model)
    if args.json:
        print(json.dumps(model, indent=2))
        return
    for label, text in _details(model):
        print(f"{label:<14}{text}")


def check_name(model: str) -> None:
    """Raise `UserError` unless this package registers a model, and the tag, of this name."""
    name, tag = split_model_name_tag(model)
    names = our_models()
    if name not in names:
        what = "is a model of timm, not of this package" if is_model(name) else "is unknown"
        released = {
            facts.released.lower(): ours
            for family in families().values()
            for ours, facts in family.models.items()
            if facts.released and ours in names
        }
        ours = released.get(name.lower()) or next((n for n in names if n == name.lower()), None)
        hint = f" (did you mean {ours}?)" if ours else did_you_mean(name.lower(), names)
        raise UserError(f"model '{model}' {what}{hint}; `vitlinear list --all` has all")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
    tags += [row.tag for row in published_files(name) if row.task == "classification"]
    if tag and tag not in tags:
        has = f"its tags: {', '.join(dict.fromkeys(tags))}" if tags else "it has no tags"
        raise UserError(f"model {name} has no tag '{tag}'{did_you_mean(tag, tags)}; {has}")


def _details(model: dict[str, Any]) -> list[tuple[str, str]]:
    name, macs, published = model["model"], model["multiply_adds"], model["published"]
    paper, base = model["paper"], name.partition(".")[0]
    title = families()[model["family"]].title
    lines = [("model", name), ("family", f"{model['family']} ({title})")]
    if model["note"]:
        lines.append(("", model["note"]))
    lines.append(("attention", model["attention"]))
    lines.append(("input", "x".join(map(str, model["input_size"]))))
    lines.append(("classes", str(model["classes"])))
    lines.append(("parameters", f"{mega(model['parameters'])} ({model['parameters']:,})"))
    if macs:
        parts = ", ".join(f"{giga(macs[key])} {key}" for key in list(macs)[1:])
        lines.append(("GMACs", f"{giga(macs['total'])} for one image: {parts}"))
    if published:
        kind = published["multiply_adds_count"]
        which = {"neither": "nearer than 3% to neither total nor projections", None: "not compared"}
        text = which.get(kind, f"which counts {kind}")
        params, published_macs = published["parameters_m"], published["multiply_adds_g"]
        costs = [f"{params}M parameters"] if params else []
        costs += [f"{published_macs} GMACs ({text})"] if published_macs else []
        figures = [", ".join(costs)] if costs else []
        figures += [
            f"{value} ImageNet-1K top-1 ({base}.{tag}), not measured here"
            for tag, value in published["imagenet_1k_top1"].items()
        ]
        figures.append(f"source: {published['source']}")
        lines += [("" if i else "published", text) for i, text in enumerate(figures)]
    for size, value in (model["agreement_with_released_code"] or {}).items():
        lines.append(("measured", f"logits at {size} within {value:.0e} of the authors' code's"))
    for row in model["weights"]:
        how = "pretrained=True" if row["pretrained"] else "download it, then file="
        lines.append(("weights", f"{row['name']} ({how}), licence: {row['license']}"))
        known = [f"{row['bytes']:,} bytes"] if row["bytes"] else []
        known += [f"SHA-256 {row['sha256']}..."] if row["sha256"] else []
        lines.append(
            ("", " ".join([row["location"], *([f"({', '.join(known)})"] if known else [])]))
        )
    if not model["weights"]:
        lines.append(("weights", "none published"))
    lines.append(("paper", f"{paper['title']}, arXiv:{paper['arxiv']}, {paper['venue']}"))
    if paper["code"]:
        lines.append(("authors' code", paper["code"]))
    return lines
