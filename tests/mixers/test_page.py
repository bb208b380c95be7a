"""docs/mixers.md and what it is made of: the registry, results, and systems of the literature."""

from __future__ import annotations

import json

import pytest
import yaml

from benchmarks import mixers as benchmark
from tools import make_mixers
from vitlinear.mixers import list_attentions


def test_page_is_current():
    text = make_mixers.PAGE.read_text(encoding="utf-8")
    assert text == make_mixers.render(), "run python tools/make_mixers.py"


def test_every_system_has_a_place_or_a_reason():
    systems = yaml.safe_load(make_mixers.SYSTEMS.read_text())
    assert len(systems) == len({system["system"] for system in systems}) == 43
    assert all(system["here"] or system["note"] for system in systems)


def test_measurements(tmp_path, monkeypatch):
    """The command measures, keeps what it did not measure anew, and the page shows it."""
    common = ["--seconds", "0", "--sides", "2", "3", "--output", str(tmp_path)]
    benchmark.main([*common, "--only", "elu", "softmax"])
    before = json.loads((tmp_path / "mixers_cpu.json").read_text())
    benchmark.main([*common, "--only", "elu"])
    after = json.loads((tmp_path / "mixers_cpu.json").read_text())
    assert [(r["attention"], r["tokens"]) for r in after["rows"]] == [
        ("elu", 4), ("elu", 9), ("softmax", 4), ("softmax", 9),
    ]  # fmt: skip
    assert after["rows"][2:] == before["rows"][2:]
    assert (tmp_path / "mixers_cpu.svg").read_text().lstrip().startswith("<?xml")
    study = {"summary": [{"attention": "elu", "mean": 61.25, "sd": 0.5}]}
    rows = [
        {"attention": name, "tokens": n, "forward_ms": ms, "peak_MiB": 3.2}
        for name, times in (("elu", (4.0, 8.0)), ("softmax", (2.0, 32.0)))
        for n, ms in zip((196, 784), times, strict=True)
    ]
    text = make_mixers.measured({"rows": rows}, study)
    (line,) = (line for line in text.splitlines() if line.startswith("| `elu` "))
    cells = ["`elu`", "61.2 ± 0.5", "250, 3", "125, 3", *["not yet measured"] * 2, "310"]
    assert line == "| " + " | ".join(cells) + " |"


@pytest.mark.parametrize(
    ("ours", "expected"), [((1, 1), 4), ((3, 9), None), ((4, 2), pytest.approx(8))]
)
def test_crossover(ours, expected):
    rows = [
        {"attention": name, "tokens": n, "forward_ms": ms}
        for name, times in (("ours", ours), ("softmax", (2, 4)))
        for n, ms in zip((4, 16), times, strict=True)
    ]
    assert benchmark.crossover(rows, "ours") == expected


def test_all_are_measured():
    assert set(list_attentions()) <= set(benchmark.specs())
