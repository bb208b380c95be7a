"""Model cards: made again and compared, and what each has to say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tools import make_cards
from vitlinear import models as registry
from vitlinear.cards.render import at_most, family_models, render
from vitlinear.facts import counts, families

ROOT = Path(__file__).parents[2]
MADE = [family for family in families().values() if family_models(family)]


@pytest.mark.parametrize("family", MADE, ids=lambda family: family.name)
def test_card_is_current(family):
    path = ROOT / "model_cards" / f"{family.name}.md"
    assert path.read_text(encoding="utf-8") == render(family), "run python tools/make_cards.py"


def test_no_other_cards():
    cards = {path.stem for path in (ROOT / "model_cards").iterdir()}
    assert cards == {family.name for family in MADE}


@pytest.mark.slow
def test_counts_are_of_these_models():
    """Parameters, input sizes and golden outputs; `test_count` counts again."""
    assert make_cards.update_counts(None, check=True) == []


@pytest.mark.parametrize("family", MADE, ids=lambda family: family.name)
def test_header(family):
    text = render(family)
    start, header, _ = text.split("---\n", 2)
    fields = yaml.safe_load(header)
    assert start == "" and fields["library_name"] == "timm"
    assert fields["pipeline_tag"] == "image-classification"
    assert f"arxiv:{family.paper['arxiv']}" in fields["tags"]
    assert fields["license"] in ("mit", "apache-2.0", "unknown")


@pytest.mark.parametrize("family", MADE, ids=lambda family: family.name)
def test_body(family):
    text = render(family)
    for name in family_models(family):
        assert f"| `{name}` |" in text
        assert f"{counts()[name]['params'] / 1e6:.2f}M" in text
    for section in ("What the attention computes", "Where softmax stays", "Weights", "Use"):
        assert f"\n## {section}\n" in text
    unpublished = not any(model.published for model in family.models.values())
    assert ("Sources of the published figures" in text) != unpublished
    for line in text.splitlines():
        assert len(line) <= 100 or line.startswith(("|", "    ")) or " " not in line.strip(), line


def test_figures_that_differ_are_told():
    text = render(families()["nalaformer"])
    assert re.search(r"nalaformer_xt.*6\.14M \| 8M .* 0\.652 .*\| 1\.0 \| neither \| 79\.1", text)
    assert "82.9 (secondary)" in render(families()["mala"])


def test_check_fails_on_a_stale_card(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(make_cards, "ROOT", tmp_path)
    monkeypatch.setattr(make_cards, "CARDS", tmp_path / "model_cards")
    monkeypatch.setattr(make_cards, "update_counts", lambda recount, check: [])
    assert make_cards.main(["--check"]) == 1
    assert "model_cards/rala.md" in capsys.readouterr().out
    assert make_cards.main([]) == 0
    assert make_cards.main(["--check"]) == 0
    (tmp_path / "model_cards" / "rala.md").write_text("edited by hand")
    assert make_cards.main(["--check"]) == 1


def test_check_fails_on_stale_counts(monkeypatch, tmp_path):
    target = tmp_path / "counts.json"
    text = make_cards.COUNTS.read_text()
    target.write_text(text.replace('"params": 558776', '"params": 558777'))
    monkeypatch.setattr(make_cards, "COUNTS", target)
    few = [name for name in registry.our_models() if name.startswith("test_ravlt")]
    monkeypatch.setattr(registry, "our_models", lambda: few)
    assert set(few) <= set(make_cards.update_counts(None, check=True))
    assert target.read_text() != text  # nothing was written


AGREEING = [name for name, entry in counts().items() if "agreement" in entry]


@pytest.mark.nightly  # the tests of each family compare the same outputs in every run
@pytest.mark.slow
@pytest.mark.parametrize("name", AGREEING)
def test_agreement(name):
    """The differences on the card, to the power of ten that it prints."""
    for size, difference in make_cards.agreement(name).items():
        assert difference < 1e-6
        assert difference <= 10 * float(at_most(counts()[name]["agreement"][size]))


@pytest.mark.parametrize("value, text", [(1.3e-15, "1e-14"), (1e-15, "1e-15"), (0.0, "0")])
def test_at_most(value, text):
    assert at_most(value) == text


def test_check_does_not_count(capsys):
    with pytest.raises(SystemExit) as stop:
        make_cards.main(["--check", "--recount"])
    assert stop.value.code == 2 and "cannot --recount" in capsys.readouterr().err
