"""The study of all attentions: its skeletons, a tiny run of the script, and its statistics."""

from __future__ import annotations

import gzip
import json
import struct

import numpy as np
import pytest
from scipy import stats

from benchmarks import fashion_mnist, study_table

FEW = ("softmax", "l2")


def write_images(folder, train=96, test=40):
    """Fashion-MNIST's four files, of noise that is brighter for higher labels."""
    random = np.random.RandomState(0)
    folder.mkdir()
    for split, count in (("train", train), ("t10k", test)):
        labels = random.randint(0, 10, count).astype(np.uint8)
        pixels = random.randint(0, 40, (count, 28, 28)) + 20 * labels[:, None, None]
        images = struct.pack(">IIII", 0x803, count, 28, 28) + pixels.astype(np.uint8).tobytes()
        for kind, raw in (
            ("images-idx3", images),
            ("labels-idx1", struct.pack(">II", 0x801, count) + labels.tobytes()),
        ):
            (folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(raw))
    return folder


@pytest.mark.parametrize("skeleton", fashion_mnist.SKELETONS)
def test_skeletons_differ_in_their_attention_alone(skeleton):
    models = {name: fashion_mnist.make_model(skeleton, name) for name in fashion_mnist.ATTENTIONS}
    for name, model in models.items():
        types = {m.attn_type for m in model.modules() if hasattr(m, "attn_type")}
        assert types == {name}
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        extra = {key for key in shapes if key.endswith("temperature")}
        assert bool(extra) == (name == "l2")
        assert {k: v for k, v in shapes.items() if k not in extra} == {
            k: v.shape for k, v in models["softmax"].state_dict().items()
        }
        assert 1_000_000 < sum(p.numel() for p in model.parameters()) < 3_000_000


@pytest.mark.slow
def test_script(tmp_path, monkeypatch):
    monkeypatch.setitem(fashion_mnist.SKELETONS["pyramid"][2], "depths", (1, 1, 1, 1))
    monkeypatch.setitem(fashion_mnist.SKELETONS["isotropic"][2], "depth", 1)
    data = write_images(tmp_path / "data")
    (tmp_path / "results").mkdir()
    output = str(tmp_path / "study")
    common = ["--output", output, "--only", *FEW]
    run = [*common, "--data-dir", str(data), "--images", "64", "--seeds", "0"]
    fashion_mnist.main(run)
    paths = {path.name: path for path in (tmp_path / "study" / "runs").iterdir()}
    assert sorted(paths) == [
        f"{skeleton}-64-{name}-0.json"
        for skeleton in ("isotropic", "pyramid")
        for name in ("l2", "softmax")
    ]
    record = json.loads(paths["pyramid-64-softmax-0.json"].read_text())
    assert 0 <= record["eval_top1"] <= 100 and record["images"] == 64

    # What has a record is left alone; a run that fails is recorded with its reason.
    before = paths["isotropic-64-l2-0.json"].stat().st_mtime_ns
    paths["pyramid-64-l2-0.json"].unlink()
    with monkeypatch.context() as patch:
        patch.setitem(fashion_mnist.SKELETONS["pyramid"][2], "num_heads", (3, 2, 4, 5))
        fashion_mnist.main(run)
    assert paths["isotropic-64-l2-0.json"].stat().st_mtime_ns == before
    failed = json.loads(paths["pyramid-64-l2-0.json"].read_text())
    assert "cannot build ravlt_t" in failed["error"] and "eval_top1" not in failed

    monkeypatch.setattr(fashion_mnist, "LARGER_SIDE", 48)
    fashion_mnist.main([*common, "--speed", "--seconds", "0"])
    speed = json.loads((tmp_path / "study" / "speed.json").read_text())
    assert [row["side"] for row in speed["rows"]] == [40, 40, 48, 48, 28, 28, 48, 48]
    assert all(row["images_per_s"] > 0 and row["peak_MiB"] > 1 for row in speed["rows"])

    monkeypatch.setattr(fashion_mnist, "HERE", tmp_path)
    page = tmp_path / "accounts" / "fashion-mnist.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- fashion-mnist -->old<!-- /fashion-mnist -->\nafter\n")
    fashion_mnist.main([*common, "--table"])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| l2 |" in text and "failed" in text and "Images/s" in text
    collected = json.loads((tmp_path / "results" / "fashion_mnist_cpu.json").read_text())
    assert len(collected["runs"]) == 4 and collected["speed"] == speed


def test_study_of_the_registry(tmp_path, monkeypatch):
    """All attentions by name build in the isotropic skeleton; runs, scans and tables of some."""
    for name in fashion_mnist.MIXERS:
        assert fashion_mnist.model_kwargs("isotropic", name)
    assert {"flowformer", "mala", "softmax"} < set(fashion_mnist.MIXERS)
    data = write_images(tmp_path / "data", train=32, test=8)
    only = ["softmax", "polaformer", *fashion_mnist.DIRECTIONAL[:1]]
    common = ["--mixers", "--output", str(tmp_path / "study"), "--only", *only]
    fashion_mnist.main([*common, "--data-dir", str(data), "--images", "32", "--seeds", "0", "1"])
    names = {path.name for path in (tmp_path / "study" / "runs").iterdir()}
    # What scans the map has one seed, and nothing runs in the pyramid.
    assert len(names) == 2 * 2 + len(only) - 2
    assert all(name.startswith("isotropic-32-") for name in names)
    monkeypatch.setattr(fashion_mnist, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    page = tmp_path / "accounts" / "mixers.md"
    page.parent.mkdir()
    page.write_text("<!-- fashion-mnist --><!-- /fashion-mnist -->")
    fashion_mnist.main([*common, "--table"])
    record = json.loads((tmp_path / "results" / "fashion_mnist_mixers_cpu.json").read_text())
    seeds = {row["attention"]: row["seeds"] for row in record["summary"]}
    assert seeds == {n: [0] if n in fashion_mnist.DIRECTIONAL else [0, 1] for n in only}

    # Another machine goes on from the results; nothing is left to do there.
    results = tmp_path / "results" / "fashion_mnist_mixers_cpu.json"
    there = ["--mixers", "--output", str(tmp_path / "there"), "--only", *only, "--seeds", "0", "1"]
    there += ["--data-dir", str(data), "--images", "32", "--known-runs", str(results)]
    monkeypatch.setattr(fashion_mnist, "train_one", None)
    fashion_mnist.main(there)
    assert {path.name for path in (tmp_path / "there" / "runs").iterdir()} == names


def test_paired_difference():
    ours, theirs = [83.2, 84.1, 83.0], [82.0, 83.5, 82.1]
    difference = study_table.paired_difference(ours, theirs)
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert difference.mean - difference.half_width == pytest.approx(interval.low)
    assert difference.mean + difference.half_width == pytest.approx(interval.high)
    assert difference.is_significant == (interval.low > 0)
    single = study_table.paired_difference([1.0], [0.0])
    assert single == (1.0, None) and not single.is_significant
    assert not study_table.paired_difference([1.0, 3.0], [2.0, 1.0]).is_significant


def test_only_seeds_that_both_have_are_compared():
    def run(attention, seed, top1):
        found = {"eval_top1": top1} if top1 is not None else {"error": "no"}
        return {"skeleton": "s", "images": 9, "attention": attention, "seed": seed, **found}

    runs = [run("softmax", s, 80.0 + s) for s in (0, 1, 2)]
    runs += [run("elu", s, 70.0 + 2 * s) for s in (0, 1)] + [run("relu", s, None) for s in (0, 1)]
    rows = {
        row["attention"]: row for row in study_table.summarise(runs, ("softmax", "elu", "relu"))
    }
    assert rows["softmax"]["seeds"] == [0, 1, 2] and rows["softmax"]["mean"] == 81
    assert rows["elu"]["seeds"] == [0, 1] and rows["elu"]["minus_softmax"].mean == -9.5
    assert rows["softmax"]["minus_elu"] == (9.5, rows["elu"]["minus_softmax"].half_width)
    assert rows["relu"]["top1"] == [None, None] and "mean" not in rows["relu"]
    table = study_table.accuracy_tables([*rows.values()])
    assert (
        "| elu | 70.00 | 72.00 |  | 71.00 |" in table and "| relu | failed | failed |  |" in table
    )
    late = [run("softmax", 0, 1.0), run("elu", 1, 2.0)]
    assert not any("minus" in key for row in study_table.summarise(late, ("elu",)) for key in row)
