"""The counting and the calculation of benchmarks/rows*.py, on numbers made up here."""

import json

import pytest

from benchmarks.rows import Record
from benchmarks.rows_cost import Costs, Machine, seconds_of
from benchmarks.rows_traffic import SIZES, Message, growth


def test_exchanges_are_told_apart_by_how_they_grow() -> None:
    """A sum, a state of 100 bytes, a halo of 8 bytes a column, and a map of 2 bytes a pixel."""
    images = []
    for height, width in SIZES:
        own = height // 3 * width
        sent = {"sum": 40, "state": 2 * 100, "halo": 8 * width, "map": 2 * 2 * own}
        messages = [Message("forward", kind, kind == "sum", n) for kind, n in sent.items()]
        images.append([*messages, Message("backward", "", False, 2 * 100)])
    found = growth(*images)
    expected = {"sum": 40, "state": 100, "halo": 8, "map": 2}
    for kind, size in expected.items():
        row = {"calls": 1, "bytes": pytest.approx(size)}
        assert found["passes"]["forward"][kind] == row
        assert found["layers"][kind][kind] == row
    assert found["passes"]["backward"]["state"] == {"calls": 1, "bytes": 100}


def test_the_calculated_step_is_the_formulas() -> None:
    """On 16 GPUs: the network's link, one doubling of nodes."""
    machine = Machine(
        peak=1e12, network=1e9, utilisation=0.5, latency_node=1e-5, latency_network=2e-5
    )
    kinds = {
        "sum": {"calls": 2, "bytes": 1600},
        "state": {"calls": 1, "bytes": 1000},
        "halo": {"calls": 3, "bytes": 10},
        "map": {"calls": 0, "bytes": 0},
    }
    costs = Costs(macs=1000, params=16000, held=100, kinds=kinds)
    assert seconds_of(costs, machine, 1024, 16) == pytest.approx(
        {
            "compute": 2 * 1000 * 4 * 1024**2 / 16 / 0.5e12,
            "sum": 2 * 3e-5 + 2 * 15 / 16 * 1600 / 1e9,
            "state": 3e-5 + 15 * 1000 / 1e9,
            "halo": 3 * 3e-5 + 10 * 1024 / 1e9,
            "map": 0,
            "gradient": 2 * 15 / 16 * 4 * 16000 / 1e9,
        }
    )
    within = seconds_of(costs, machine, 1024, 8)
    assert within["sum"] == pytest.approx(2 * 1e-5 + 2 * 7 / 8 * 1600 / 450e9)


def test_rows_are_added_to_those_of_a_file(tmp_path, monkeypatch) -> None:
    """A row that is measured again takes the place of the first; another machine's file is kept."""
    file = tmp_path / "rows.json"
    Record(file).add({"kind": "weak", "ranks": 1, "seconds": 3.0})
    Record(file).add({"kind": "weak", "ranks": 2, "seconds": 2.0})
    Record(file).add({"kind": "weak", "ranks": 1, "seconds": 1.0})
    Record(file).add_models({"a": {"passes": {}}})
    Record(file).add_models({"b": {"passes": {}}})
    found = json.loads(file.read_text())
    assert [(row["ranks"], row["seconds"]) for row in found["rows"]] == [(1, 1.0), (2, 2.0)]
    assert list(found["models"]) == ["a", "b"]
    monkeypatch.setattr("benchmarks.rows.machine", lambda: "another")
    with pytest.raises(SystemExit, match="give another file"):
        Record(file)
