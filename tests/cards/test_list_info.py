"""``vitlinear list`` and ``vitlinear info``: the facts of the cards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm

import vitlinear
from vitlinear.facts import counts, families
from vitlinear.models import our_models

ROOT = Path(__file__).resolve().parents[2]


def names(out: str) -> list[str]:
    return [line.split()[0] for line in out.splitlines()[1:] if not line.startswith("*")]


def test_list(command):
    result = command("list")
    assert (result.code, result.err) == (0, "")
    assert names(result.out) == our_models(tests=False)
    line = next(line for line in result.out.splitlines() if line.startswith("ravlt_t "))
    assert line.split()[:7] == ["ravlt_t", "rala", "14.90M", "2.626", "224x224", "82.8", "fetched"]
    assert line.endswith("RALA, RALA, softmax, softmax")


def test_list_all(command):
    assert names(command("list", "--all").out) == our_models()


def test_list_family(command):
    result = command("list", "--family", "rala", "--json")
    models = json.loads(result.out)
    assert {model["family"] for model in models} == {"rala"}
    assert [m["model"] for m in models] == [n for n in our_models(False) if n.startswith("ravlt")]
    result = command("list", "--family", "rla")
    assert result.code == 2 and "did you mean rala?" in result.err


@pytest.mark.parametrize("name", ["ravlt_t", "ravlt_s_linear", "test_ravlt", "ravlt_b.in1k"])
def test_info(command, name):
    result = command("info", name)
    assert (result.code, result.err) == (0, "")
    base = name.partition(".")[0]
    assert f"{counts()[base]['params']:,}" in result.out
    assert "Low-Rank Dilemma" in result.out
    assert ("none published" in result.out) == (base not in ("ravlt_t", "ravlt_b"))


def test_info_as_json(command):
    facts = json.loads(command("info", "ravlt_b", "--json").out)
    model = timm.create_model("ravlt_b", device="meta")
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["published"]["imagenet_1k_top1"] == {"in1k": 85.5}
    assert facts["published"]["multiply_adds_count"] == "projections"
    (weights,) = facts["weights"]
    assert weights["pretrained"] and weights["bytes"] == 579_479_431
    assert facts["multiply_adds"]["total"] == counts()["ravlt_b"]["total"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("ravlt_tt", "is unknown (did you mean ravlt_t"),
        ("resnet50", "is a model of timm, not of this package"),
        ("", "is unknown"),
    ],
)
def test_info_of_others(command, name, message):
    result = command("info", name)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1


def test_info_says_what_was_not_checked(command):
    assert "Not checked against the paper" in command("info", "mavit_t").out
    assert "secondary source only" in command("list", "--family", "mala").out


def test_a_card_for_each_family():
    cards = {path.stem for path in (ROOT / "model_cards").glob("*.md")}
    assert set(families()) == cards
    assert {"rala", "mala", "inline", "nalaformer", "l2vit", "lightnet", "linear_deit"} <= cards


def test_info_of_a_tag(command):
    facts = json.loads(command("info", "l2vit_base.in22k", "--json").out)
    assert facts["model"] == "l2vit_base.in22k" and facts["classes"] == 21841
    assert [row["name"] for row in facts["weights"]] == ["l2vit_base.in22k"]
    assert facts["published"]["imagenet_1k_top1"] == {}
    result = command("info", "l2vit_base.foo")
    assert result.code == 2 and "has no tag 'foo'" in result.err and "in22k_ft_in1k" in result.err


@pytest.mark.parametrize("name", ["RAVLT_T", "Ravlt_T"])
def test_info_suggests_for_released_names(command, name):
    result = command("info", name)
    assert result.code == 2 and "did you mean ravlt_t?" in result.err


@pytest.mark.parametrize("words", [["list", "ravlt*"], ["list", "a", "b"], ["info", "a", "b"]])
def test_too_many_arguments(command, words):
    result = command(*words)
    assert result.code == 2 and "more arguments than this command takes" in result.err
    assert repr(words[-1]) in result.err and "option " not in result.err


def test_attentions(command):
    result = command("attentions")
    assert (result.code, result.err) == (0, "")
    listed = [line.split()[0] for line in result.out.splitlines()[1:-2]]
    assert listed == vitlinear.list_attentions()
    free = json.loads(command("attentions", "--order", "free", "--json").out)
    assert {row["order"] for row in free} == {"free"} and "mala" in {row["name"] for row in free}


def test_one_attention(command):
    out = command("attentions", "mala").out
    assert "arXiv:2507.00698" in out and "rows that sum to 1" in out
    assert json.loads(command("attentions", "mala", "--json").out)["year"] == 2025
    result = command("attentions", "mla")
    assert result.code == 2 and "did you mean " in result.err
    assert command("attentions", "mala", "--order", "free").code == 2
