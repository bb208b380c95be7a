"""One reader for every way to a checkpoint file, and files that load as part of another."""

from __future__ import annotations

import argparse
import os
import pathlib
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import vitlinear  # noqa: F401  registers the models
from vitlinear.checkpoints import checkpoint_filter_fn
from vitlinear.checkpoints.load import load_model, read_weights
from vitlinear.checkpoints.read import CheckpointError, read_checkpoint
from vitlinear.errors import UserError

MODEL = "test_ravlt"


def create(path: object, **kwargs):
    overlay = {"file": str(path)}
    return timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    weights = timm.create_model(MODEL).state_dict()
    weights["stem.conv1.conv.weight"].fill_(7)
    return weights


def minimum(history: object) -> None:
    """A function that a history names as its class's own."""


def stand_in(patch: pytest.MonkeyPatch, path: str, bases: tuple = (), **members) -> type:
    """A class under another package's name, whether that is installed or not."""
    module, _, name = path.rpartition(".")
    made = type(name, bases, {"__module__": module, **members})
    parts = module.split(".")
    for package in (".".join(parts[: i + 1]) for i in range(len(parts))):
        patch.setitem(sys.modules, package, type(sys)(package))
    setattr(sys.modules[module], name, made)
    return made


def save_like_a_training_script(content: dict, path: Path, **kwargs) -> None:
    """With settings of yacs and histories of mmengine."""
    with pytest.MonkeyPatch.context() as patch:
        node = stand_in(patch, "yacs.config.CfgNode", (dict,))
        history = stand_in(patch, "mmengine.logging.history_buffer.HistoryBuffer", min=minimum)
        patch.setattr(minimum, "__module__", history.__module__)
        patch.setattr(minimum, "__qualname__", "HistoryBuffer.min")  # found through `getattr`
        loss = history()
        loss.__dict__ = {"statistics_methods": {"min": minimum}, "_log_history": np.ones(3)}
        settings = node(MODEL=node(DROP_PATH=0.1), OUTPUT=pathlib.PosixPath("/a/b"))
        hub = {"log_scalars": {"loss": loss}, "runtime_info": {"epoch": 12}}
        torch.save({**content, "config": settings, "message_hub": hub}, path, **kwargs)


SETTINGS = {
    "max_accuracy": np.float64(81.25),
    "step": np.int64(7),
    "best": np.float32(0.5),
    "args": argparse.Namespace(output_dir=pathlib.PosixPath("runs/1"), lr=1e-3),
    "rng": (np.random.RandomState(0).get_state(), random.Random(0).getstate()),
}


@pytest.mark.skipif(os.name != "posix", reason="makes a PosixPath")
@pytest.mark.parametrize("zipped", [True, False])
def test_settings_beside_the_weights(weights, tmp_path, zipped):
    path = tmp_path / "in.pth"
    content = {"model": weights, **SETTINGS}
    save_like_a_training_script(content, path, _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(path)
    assert (read["max_accuracy"], read["step"], read["best"]) == (81.25, 7, 0.5)
    assert str(read["args"].output_dir) == "runs/1" and str(read["config"]["OUTPUT"]) == "/a/b"
    assert read["message_hub"]["runtime_info"] == {"epoch": 12}
    for model in (create(path), load_model(path, model=MODEL)[0]):
        assert (model.get_parameter("stem.conv1.conv.weight") == 7).all()
    assert read_weights(path).keys() == weights.keys()


def test_timm_adapts_as_ever(weights, tmp_path):
    torch.save({"state_dict": weights}, tmp_path / "in.pth")
    model = create(tmp_path / "in.pth", num_classes=3, in_chans=1)
    assert model.get_parameter("stem.conv1.conv.weight").shape[1] == 1
    assert (model.get_parameter("stem.conv1.conv.weight") == 21).all()
    assert model.get_parameter("head.fc.weight").shape[0] == 3
    assert model.pretrained_cfg["file"] == str(tmp_path / "in.pth")
    assert "state_dict" not in model.pretrained_cfg
    features = create(tmp_path / "in.pth", features_only=True)
    assert "state_dict" not in features.pretrained_cfg


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "does not exist"),
        (b"", "truncated, corrupt"),
        (b"<html>", "truncated, corrupt"),
        (b"not a model", r"truncated, corrupt or not a weights file \(.*[A-Za-z]{3}.*\)"),
        ([1, 2], "holds a list"),
        ({"epoch": 3}, "no weights in this checkpoint"),
        ({"model": Payload()}, r"\(print\).*refused"),
        ({"layer1.weight": torch.ones(2)}, "looks like another model"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, capfd, content, message):
    """The same words from every way in, on one line, with the name of the file."""
    path = tmp_path / "in.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    ways = [
        lambda: create(path),
        lambda: create(path, features_only=True),
        lambda: load_model(path, model=MODEL),
    ]
    for way in ways:
        with pytest.raises(UserError, match=message) as caught:
            way()
        text = str(caught.value)
        assert str(path) in text and "\n" not in text and "weights_only" not in text
    with pytest.raises(ValueError):
        create(path)
    assert issubclass(CheckpointError, ValueError)
    assert "executed" not in capfd.readouterr().out


def test_a_detector_gives_its_stages(weights, tmp_path):
    """As mmdet 2 saves them; what is not a stage is left out."""
    stages = {
        f"backbone.{key}": torch.full_like(value, 3)
        for key, value in weights.items()
        if not key.startswith(("final.", "head."))
    }
    more = {"backbone.extra_norms.0.weight": torch.ones(2), "neck.fpn.weight": torch.ones(2)}
    torch.save({"meta": {"epoch": 12}, "state_dict": {**stages, **more}}, tmp_path / "det.pth")
    features = create(tmp_path / "det.pth", features_only=True)
    values = dict(features.named_parameters())
    assert all((v == 3).all() for k, v in values.items() if "stages" in k or "stem" in k)
    with pytest.raises(RuntimeError, match="Missing key"):
        create(tmp_path / "det.pth")
    other = {"state_dict": {"backbone.layer1.weight": torch.ones(2), **more}}
    torch.save(other, tmp_path / "det.pth")
    with pytest.raises(ValueError, match="looks like a detector's"):
        create(tmp_path / "det.pth", features_only=True)


@pytest.mark.parametrize("name", ["inline_pvt_tiny", "inline_deit_tiny"])
def test_as_many_positions_of_another_grid(name):
    """14 x 56 are as many as 28 x 28: the values are for other places all the same."""
    square = timm.create_model(name, img_size=448, device="meta")
    wide = timm.create_model(name, img_size=(224, 896), device="meta")
    weights = {k: torch.rand(v.shape) for k, v in square.state_dict().items() if "pos_embed" in k}
    assert weights
    body = {"norm.weight": torch.ones(1), "stem.norm.weight": torch.ones(1)}
    for model, same in ((square, True), (wide, False)):
        resized = checkpoint_filter_fn({**weights, **body}, model)
        for key, value in weights.items():
            assert resized[key].shape == model.state_dict()[key].shape
            if value.shape[1] != 1:
                assert torch.equal(resized[key], value) == same
