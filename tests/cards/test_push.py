"""The ``push`` command: what it leaves is what timm and others open, as the model was trained."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
import yaml
from timm.data import resolve_model_data_config
from timm.models import save_for_hf

import vitlinear
from tests.commands import Command
from vitlinear.checkpoints.card import Card, read_card, save_weights
from vitlinear.create import build_model, data_config

NAMES = ["ant", "bee", "cat"]


def save(path: Path, name: str = "test_ravlt", **changes) -> Path:
    """A file of a model of three classes, with an input of its own."""
    torch.manual_seed(1)
    channels = changes.get("in_chans", 3)
    model = build_model(name, num_classes=3, in_chans=channels, **changes.get("model_kwargs", {}))
    asked = {"img_size": 48, "crop_pct": 1.0, "mean": (0.25,) * channels, "std": (0.5,) * channels}
    fields = {
        "model": name, "model_kwargs": {}, "num_classes": 3, "in_chans": channels,
        "data_config": data_config(model, asked), "image_mode": "RGB", "class_names": NAMES,
        "epoch": 7, "metric": {"top1": 91.25}, **changes,
    }  # fmt: skip
    save_weights(path, model.state_dict(), Card(**fields))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    save(folder / "best.safetensors")
    return folder


@pytest.mark.quick
def test_a_run_becomes_a_folder(command: Command, run: Path, tmp_path: Path) -> None:
    target = tmp_path / "hub"
    result = command("push", run, target, "--license", "cc-by-4.0")
    assert (result.code, result.err) == (0, "")
    assert f'timm.create_model("local-dir:{target}", pretrained=True)' in result.out
    assert {file.name for file in target.iterdir()} == {
        "README.md", "config.json", "model.safetensors",
    }  # fmt: skip
    assert sorted(file.name for file in tmp_path.iterdir()) == ["hub", "run"]
    expected = vitlinear.load(run / "best.safetensors")
    model = timm.create_model(f"local-dir:{target}", pretrained=True).eval()
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(model(x), expected(x))
    assert resolve_model_data_config(model)["crop_pct"] == 1.0
    assert tuple(resolve_model_data_config(model)["mean"]) == (0.25, 0.25, 0.25)
    assert model.pretrained_cfg["label_names"] == NAMES
    # our own commands know the file in it
    assert torch.equal(vitlinear.load(target / "model.safetensors")(x), expected(x))

    _, header, text = (target / "README.md").read_text("utf-8").split("---\n", 2)
    assert yaml.safe_load(header)["license"] == "cc-by-4.0"
    for part in ("ant, bee, cat", "3x48x48, mean [0.25", "Epochs:** 7", "Held-out top1:** 91.25"):
        assert part in text


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "test_inline_deit", "model_kwargs": {"img_size": [48, 48], "depth": 2}},
        {"name": "test_ravlt", "in_chans": 1},
        {"name": "test_l2vit", "model_kwargs": {"global_pool": "max"}},
        {"name": "resnet10t"},
    ],
)
def test_other_models(command: Command, tmp_path: Path, changes: dict) -> None:
    """Positions of another size, one channel, another pooling, a model of timm's own."""
    path = save(tmp_path / "w.safetensors", **changes)
    assert command("push", path, tmp_path / "hub").code == 0
    expected = vitlinear.load(path)
    model = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    x = torch.randn(2, changes.get("in_chans", 3), 48, 48)
    assert torch.equal(model(x), expected(x)) and model.pretrained_cfg["label_names"] == NAMES


def test_licence(command: Command, tmp_path: Path) -> None:
    """The authors' for their weights, and nobody's for those of a run, until its owner says."""
    path = save(tmp_path / "w.safetensors")
    assert (
        "licence       unknown (--license ID says it)" in command("push", path, tmp_path / "a").out
    )
    weights, card = safetensors.torch.load_file(path), read_card(path)
    save_weights(tmp_path / "p.safetensors", weights, card, {"published_at": "https://a/b.pth"})
    assert "licence       mit\n" in command("push", tmp_path / "p.safetensors", tmp_path / "b").out
    config = json.loads((tmp_path / "b" / "config.json").read_text("utf-8"))
    assert config["pretrained_cfg"]["license"] == "mit"


def test_training_goes_on_from_a_folder(command: Command, images: Path, tmp_path: Path) -> None:
    """The files of such a run do not need the folder any more."""
    command("push", save(tmp_path / "w.safetensors"), tmp_path / "hub")
    flags = ["--model", f"local-dir:{tmp_path / 'hub'}", "--pretrained", "--data-dir", images]
    flags += ["--output", tmp_path / "run", "--epochs", 1, "-b", 8, "-j", 0, "--no-plot"]
    result = command("train", *flags)
    assert result.code == 0, result.err
    shutil.rmtree(tmp_path / "hub")
    model = vitlinear.load(tmp_path / "run" / "best.safetensors")
    assert model.pretrained_cfg["label_names"] == tuple(NAMES)
    assert resolve_model_data_config(model)["mean"] == (0.25,) * 3
    assert command("push", tmp_path / "run", tmp_path / "again").code == 0


@pytest.mark.parametrize("changes", [{}, {"in_chans": 1, "model_kwargs": {"global_pool": "max"}}])
def test_the_constructor_call_of_transformers(tmp_path: Path, changes: dict) -> None:
    """transformers gives the number of classes itself, and the model's arguments beside it."""
    from vitlinear.cards.push import write_folder

    write_folder(save(tmp_path / "w.safetensors", **changes), tmp_path / "hub", "mit")
    config = json.loads((tmp_path / "hub" / "config.json").read_text("utf-8"))
    assert config["label_names"] == NAMES and config["pretrained_cfg"]["mean"][0] == 0.25
    arguments = {"num_classes": config["num_classes"], **config["model_args"]}
    assert "num_classes" not in config["model_args"]
    model = timm.create_model(config["architecture"], pretrained=False, **arguments).eval()
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "hub" / "model.safetensors"))
    x = torch.randn(2, changes.get("in_chans", 3), 48, 48)
    assert torch.equal(model(x), vitlinear.load(tmp_path / "w.safetensors")(x))


@pytest.mark.parametrize("changes", [{}, {"in_chans": 1, "model_kwargs": {"global_pool": "max"}}])
def test_transformers(tmp_path: Path, changes: dict) -> None:
    """The folder in transformers."""
    transformers = pytest.importorskip("transformers", reason="pip install 'vitlinear[dev]'")
    from vitlinear.cards.push import write_folder

    path = save(tmp_path / "w.safetensors", **changes)
    write_folder(path, tmp_path / "hub", "mit")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hub").eval()
    x = torch.randn(2, changes.get("in_chans", 3), 48, 48)
    assert torch.equal(model(x).logits, vitlinear.load(path)(x))
    assert list(model.config.id2label.values()) == NAMES
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hub")
    assert processor.data_config["crop_pct"] == 1.0 and processor.data_config["mean"][0] == 0.25


@pytest.mark.parametrize("name", ["test_ravlt", "resnet10t"])
def test_what_timm_saves_opens_in_transformers_without_one_argument(
    tmp_path: Path, name: str
) -> None:
    """The way that docs/export.md tells; timm finds the number of classes elsewhere."""
    model = vitlinear.load(save(tmp_path / "w.safetensors", name))
    save_for_hf(model, tmp_path / "hub", safe_serialization=True)
    path = tmp_path / "hub" / "config.json"
    config = json.loads(path.read_text())
    del config["model_args"]["num_classes"]
    path.write_text(json.dumps(config))
    x = torch.randn(2, 3, 48, 48)
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert torch.equal(again(x), model(x)) and again.pretrained_cfg["label_names"] == NAMES
    made = timm.create_model(
        config["architecture"], num_classes=config["num_classes"], **config["model_args"]
    )
    made.load_state_dict(model.state_dict())
    if importlib.util.find_spec("transformers"):
        from transformers import AutoModelForImageClassification

        opened = AutoModelForImageClassification.from_pretrained(tmp_path / "hub").eval()
        assert torch.equal(opened(x).logits, model(x))


def test_what_cannot_be_pushed(command: Command, run: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.pth"
    torch.save(vitlinear.load(run / "best.safetensors").state_dict(), plain)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in (
        ((plain, tmp_path / "hub"), "does not say which model it is: `vitlinear convert"),
        ((tmp_path, tmp_path / "hub"), "is no run of `vitlinear train`: it has no best"),
        ((tmp_path / "none", tmp_path / "hub"), "none does not exist"),
        ((run, tmp_path / "full"), "full exists and is not an empty folder"),
        ((run, plain), "plain.pth exists and is not"),
        ((run, tmp_path / "no" / "hub"), "its folder does not exist"),
        ((run, tmp_path / "hub", "--private"), "--private is for hf-hub:OWNER/NAME"),
        ((run, "hf-hub:a/b/c"), "hf-hub:a/b/c is no name on the hub"),
    ):
        result = command("push", *arguments)
        assert result.code == 2 and message in result.err and result.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the hub, behind the calls that are made of its client."""
    root = tmp_path / "hub"

    class Api:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            if repo_id == "else/model":
                raise OSError("403 Forbidden:\nyou are not the owner")
            (root / repo_id).mkdir(parents=True, exist_ok=True)
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, repo_id, filename):
            return (root / repo_id / filename).is_file()

        def upload_folder(self, repo_id, folder_path, ignore_patterns, commit_message):
            ignored = shutil.ignore_patterns(*ignore_patterns or ())
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True, ignore=ignored)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return root


def test_to_the_hub(command: Command, run: Path, hub: Path) -> None:
    result = command("push", run, "hf-hub:me/model", "--license", "mit")
    assert result.code == 0 and 'timm.create_model("hf-hub:me/model"' in result.out
    readme = hub / "me/model" / "README.md"
    assert 'timm.create_model("hf-hub:me/model", pretrained=True)' in readme.read_text("utf-8")
    assert timm.create_model(f"local-dir:{hub / 'me/model'}", pretrained=True).num_classes == 3
    readme.write_text("my own words")
    assert command("push", run, "hf-hub:me/model").code == 0
    assert readme.read_text() == "my own words"
    refused = command("push", run, "hf-hub:else/model")
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert "cannot push to hf-hub:else/model: 403 Forbidden: you are not the owner" in refused.err
