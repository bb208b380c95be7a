"""``vitlinear convert``: what it recognises, what it writes, what it refuses."""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import timm
import torch

from tests import golden
from vitlinear import models as registry
from vitlinear.checkpoints.load import load_model
from vitlinear.convert.recognise import recognise
from vitlinear.errors import UserError
from vitlinear.facts import PUBLISHED, families, published_row
from vitlinear_cli import main

GOLDEN = {
    released: path.stem
    for path in golden.FOLDER.glob("*.json")
    for released in json.loads(path.read_text())
}
RELEASED = {
    facts.released: (name, GOLDEN[facts.released])
    for family in families().values()
    for name, facts in family.models.items()
    if facts.released and timm.is_model(name)
}
ON_META = functools.cache(registry.on_meta)


def released_weights(released: str, device: str | None = None) -> dict[str, torch.Tensor]:
    """Weights under the authors' keys, float32, or without storage."""
    entries = golden.variants(RELEASED[released][1])[released]["state_dict"]
    if device == "meta":
        return {
            key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            for key, shape, dtype in entries
        }
    weights = golden.upstream_state_dict(entries)
    return {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}


def shapes(name: str) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in ON_META(name).state_dict().items()}


def run(capsys, *args: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["convert", *map(str, args)])
    return code, *capsys.readouterr()


@pytest.fixture(autouse=True)
def models_built_once(monkeypatch):
    """Each test looks through many of the same models."""
    monkeypatch.setattr(registry, "on_meta", ON_META)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return released_weights("RAVLT_T")


@pytest.fixture(scope="module")
def checkpoint(weights, tmp_path_factory) -> Path:
    """A checkpoint as the authors' script writes it, under the name of the published file."""
    path = tmp_path_factory.mktemp("released") / "RAVLT_T.pth"
    moments = {0: {"exp_avg": torch.zeros(1000)}}
    torch.save(
        {
            "model": {key: torch.zeros_like(value) for key, value in weights.items()},
            "model_ema": {f"module.{key}": value for key, value in weights.items()},
            "optimizer": {"state": moments, "param_groups": []},
            "epoch": 299,
            "args": argparse.Namespace(model="RAVLT_T"),
            "max_accuracy": 82.8,
        },
        path,
    )
    return path


def test_training_checkpoint(checkpoint, weights, tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    code, out, err = run(capsys, checkpoint, target)
    assert (code, err) == (0, "")
    assert "0 missing keys, 0 unexpected" in out and "ravlt_t.in1k" in out
    assert "under model_ema; left out: model, optimizer, epoch, args, max_accuracy" in out
    assert [file.name for file in tmp_path.iterdir()] == ["out.safetensors"]
    with safetensors.safe_open(target, "pt") as file:
        metadata = file.metadata()
        kept = set(file.keys())
    assert metadata["source_file"] == "RAVLT_T.pth"
    assert metadata["source_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert metadata["mapping"] == "pyramid" and metadata["model"] == "ravlt_t.in1k"
    assert metadata["license"] == "mit" and metadata["matched_by"] == "file name only"
    assert "matched by file name only" in out
    assert metadata["published_at"].endswith("aldjalkdf/RAVLT/resolve/main/RAVLT_T.pth")

    for file in (checkpoint, target):
        overlay = {"file": str(file)}
        model = timm.create_model("ravlt_t", pretrained=True, pretrained_cfg_overlay=overlay)
        assert kept == model.state_dict().keys()
        stem = model.stem.conv1.conv.weight
        assert torch.equal(stem, weights["patch_embed.proj.0.weight"])
        scale = model.stages[2].blocks[5].ls2.gamma
        assert torch.equal(scale, weights["layers.2.blocks.5.gamma_2"].flatten())


def test_converted_file_knows_itself(checkpoint, tmp_path, capsys):
    """The card that the other commands read: model, classes and input."""
    target, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    run(capsys, checkpoint, target)
    model, card = load_model(target)
    assert card is not None and card.model == "ravlt_t" and card.num_classes == 1000
    assert card.data_config.crop_pct == 0.875 and card.image_mode == "RGB"
    assert not model.training
    # Ours again: the tensors alone would fit several models, but the file says which it is.
    assert run(capsys, target, again)[0] == 0
    with safetensors.safe_open(target, "pt") as one, safetensors.safe_open(again, "pt") as two:
        assert one.metadata() == two.metadata()
    first, second = (safetensors.torch.load_file(file) for file in (target, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "released",
    [
        pytest.param(name, marks=pytest.mark.nightly if i % 4 else ())
        for i, name in enumerate(RELEASED)
    ],
)
def test_every_released_model_is_recognised(released):
    """From keys and shapes alone; those that another has too, from the published file."""
    name = RELEASED[released][0]
    weights = released_weights(released, "meta")
    twins = [other for other, _ in RELEASED.values() if shapes(other) == shapes(name)]
    if twins == [name]:
        assert recognise(weights).name == name
        return
    # Sizes that differ in their windows alone, and share every key and shape.
    with pytest.raises(UserError, match="several models: give --model, one of") as caught:
        recognise(weights)
    assert all(other in str(caught.value) for other in twins)
    for row in PUBLISHED:
        if row.model == name and row.wired:
            assert recognise(weights, {row.model}).name == name


def test_other_classes_and_channels(weights, tmp_path, capsys):
    """A model that somebody trained further with the authors' code."""
    changed = dict(weights)
    changed["head.weight"] = changed["head.weight"][:7]
    changed["head.bias"] = changed["head.bias"][:7]
    changed["patch_embed.proj.0.weight"] = changed["patch_embed.proj.0.weight"][:, :1]
    torch.save(changed, tmp_path / "RAVLT_T.pth")  # the released name shows nothing by itself
    target = tmp_path / "out.safetensors"
    code, out, _ = run(capsys, tmp_path / "RAVLT_T.pth", target)
    assert "licence       not known" in out
    assert code == 0 and "7 classes, 1 channels" in out and "weights       bare" in out
    with safetensors.safe_open(target, "pt") as file:
        card = json.loads(file.metadata()["vitlinear"])
        assert file.get_tensor("head.fc.weight").shape[0] == 7
        assert not {"published_at", "license", "matched_by"} & file.metadata().keys()
    assert (card["num_classes"], card["in_chans"], card["image_mode"]) == (7, 1, "L")


@pytest.mark.parametrize("name", ["test_inline_deit", "test_inline_pvt", "test_pola_pvt"])
def test_positions_of_another_size_stay_what_they_are(name, tmp_path, capsys, monkeypatch):
    """The file is a model for the images that the checkpoint was made for."""
    monkeypatch.undo()  # models of several sizes
    model = timm.create_model(name, img_size=128)
    source, target = tmp_path / "w.pth", tmp_path / "out.safetensors"
    torch.save(model.state_dict(), source)
    code, out, err = run(capsys, source, target, "--model", name)
    assert code == 0, err
    assert "3 channels, for images of 128x128\n" in out and "resized" not in out
    loaded, card = load_model(target)
    assert card is not None and card.model_kwargs == {"img_size": 128}
    assert card.data_config.input_size == (3, 128, 128)
    mine = loaded.state_dict()
    assert all(torch.equal(value, mine[key]) for key, value in model.state_dict().items())


def test_positions_of_no_usual_size_are_told_of(tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    source, target = tmp_path / "w.pth", tmp_path / "out.safetensors"
    torch.save(timm.create_model("test_inline_deit", img_size=80).state_dict(), source)
    code, out, err = run(capsys, source, target, "--model", "test_inline_deit")
    assert code == 0, err
    assert "resized       1 tables of positions, which are of images of another size" in out


def test_no_model_fits(weights, tmp_path, capsys):
    changed = {k: v for k, v in weights.items() if k != "layers.0.blocks.1.pos.weight"}
    changed["layers.0.blocks.1.extra"] = torch.ones(3)
    changed["proj.bias"] = torch.ones(5)
    torch.save(changed, tmp_path / "in.pth")
    for more in ((), ("--model", "ravlt_t")):
        code, out, err = run(capsys, tmp_path / "in.pth", tmp_path / "out.safetensors", *more)
        assert code == 2 and err.count("\n") == 1
        assert more or "nearest is ravlt_t, which has" in err
        assert "1 missing keys, 1 unexpected, 1 of another shape" in err and "ravlt_t" in err
        assert "such as stages.0.blocks.1.pos.weight, stages.0.blocks.1.extra, final" in err
        assert "missing: stages.0.blocks.1.pos.weight" in out
        assert "unexpected: stages.0.blocks.1.extra" in out
        assert "of another shape: final" in out
    assert [file.name for file in tmp_path.iterdir()] == ["in.pth"]


def test_nothing_is_near(weights, tmp_path, capsys):
    torch.save({"layer1.0.weight": torch.ones(7, 5)}, tmp_path / "in.pth")
    code, out, err = run(capsys, tmp_path / "in.pth", tmp_path / "out.safetensors")
    assert code == 2 and "none is near" in err and out == ""


def test_published_rows(tmp_path, monkeypatch):
    """By hash under any name; by name and size; by name where nothing else is known."""
    path = tmp_path / "MAViT_L.pth"
    path.write_bytes(b"x")
    assert published_row(path, "0" * 64) is None
    row, how = published_row(path, "17ea9be6" + "0" * 56)
    assert (row.model, how) == ("mavit_l", "SHA-256")
    assert published_row(path.rename(tmp_path / "RAVLT_B.pth"), "0" * 64) is None
    for row in PUBLISHED:
        if row.wired:
            cfg = timm.get_pretrained_cfg(f"{row.model}.{row.tag}", allow_unregistered=False)
            assert cfg is not None


class Payload:
    """A callable that unpickling would have to execute."""

    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return (self.function, ("echo executed",))


@pytest.mark.parametrize("function, name", [(print, "print"), (os.system, "posix.system")])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused(weights, tmp_path, capfd, function, name, zipped):
    path = tmp_path / "bad.pth"
    content = {"model": weights, "x": Payload(function)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    code, out, err = run(capfd, path, tmp_path / "out.safetensors")
    assert code == 2 and f"({name})" in err and "refused" in err
    assert err.count("\n") == 1 and "executed" not in out + err
    assert [file.name for file in tmp_path.iterdir()] == ["bad.pth"]


def test_settings_of_a_training_script(weights, tmp_path, capsys, monkeypatch):
    """The dict type of yacs is taken for a dict; nothing of yacs runs, or need be installed."""
    yacs = type(sys)("yacs.config")

    class CfgNode(dict):
        def __init__(self, *args):
            super().__init__(*args)
            print("executed")

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    yacs.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", type(sys)("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", yacs)
    settings = CfgNode({"MODEL": CfgNode({"DROP_PATH": 0.1})})
    settings.frozen = True
    torch.save({"model": weights, "config": settings}, tmp_path / "in.pth")
    monkeypatch.delitem(sys.modules, "yacs.config")
    code, out, err = run(capsys, tmp_path / "in.pth", tmp_path / "out.safetensors")
    assert (code, err) == (0, "")
    assert "left out: config" in out and "executed" not in out


def damaged(kind: str, path: Path, good: Path) -> None:
    content = good.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>404</html>")
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "no weights":
        torch.save({"epoch": 3, "optimizer": {}}, path)
    elif kind == "truncated pickle":
        buffer = io.BytesIO()
        pickle.dump({"a": list(range(1000))}, buffer)
        path.write_bytes(buffer.getvalue()[:100])
    elif kind == "folder":
        path.mkdir()


@pytest.mark.parametrize(
    "kind, message",
    [
        ("truncated", "truncated, corrupt"),
        ("empty", "truncated, corrupt"),
        ("text", "truncated, corrupt"),
        ("truncated pickle", "truncated, corrupt"),
        ("list", "holds a list"),
        ("no weights", "no weights in this checkpoint"),
        ("folder", "is a folder"),
        ("missing", "does not exist"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_is_no_checkpoint(checkpoint, tmp_path, capsys, kind, message, suffix):
    path = tmp_path / f"in{suffix}"
    damaged(kind, path, checkpoint)
    if suffix == ".safetensors" and kind in ("list", "no weights"):
        message = "truncated, corrupt"
    code, _, err = run(capsys, path, tmp_path / "out.safetensors")
    assert code == 2 and message in err and err.count("\n") == 1 and len(err) < 500
    assert not (tmp_path / "out.safetensors").exists()


def test_the_target(checkpoint, tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    target.write_text("something else")
    for path, message in (
        (tmp_path / "out.pth", "has to end with .safetensors"),
        (tmp_path / "nowhere" / "out.safetensors", "its folder does not exist"),
        (target, "--overwrite"),
    ):
        code, _, err = run(capsys, checkpoint, path)
        assert code == 2 and message in err
    assert target.read_text() == "something else"
    assert run(capsys, checkpoint, target, "--overwrite")[0] == 0
    code, _, err = run(capsys, target, target, "--overwrite")
    assert code == 2 and f"cannot write {target}: the command reads it" in err
    code, _, err = run(capsys, checkpoint, tmp_path / "b.safetensors", "--model", "ravlt_x")
    assert code == 2 and "did you mean ravlt_" in err


def test_nothing_half_written(checkpoint, tmp_path, capsys, monkeypatch):
    """The disk fills up while it writes."""
    target = tmp_path / "out.safetensors"
    target.write_text("old")

    def fail(path, data):
        with open(path, "wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    code, _, err = run(capsys, checkpoint, target, "--overwrite")
    assert code == 2 and "No space left on device" in err
    assert [file.name for file in tmp_path.iterdir()] == ["out.safetensors"]
    assert target.read_text() == "old"
