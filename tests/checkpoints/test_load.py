"""Weights files on their way through timm: the model, its input and its classes stay as trained."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import save_for_hf

import vitlinear
from vitlinear.checkpoints.card import Card, save_weights
from vitlinear.create import build_model, data_config
from vitlinear.dense.backbone import MultiScaleBackbone
from vitlinear.errors import Notice, UserError
from vitlinear.train.start_weights import initial_weights

NAMES = ["ant", "bee", "cat"]
INPUT = {
    "input_size": (3, 48, 48),
    "mean": (0.1, 0.2, 0.3),
    "std": (0.4, 0.5, 0.6),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "squash",
}


def save(path: Path, name: str, in_chans: int = 3, **model_kwargs) -> torch.nn.Module:
    """A model of three classes in a file that describes itself; returns it."""
    torch.manual_seed(1)
    model = build_model(name, num_classes=3, in_chans=in_chans, **model_kwargs).eval()
    with torch.no_grad():
        model.get_classifier().bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    asked = {**INPUT, "mean": INPUT["mean"][:in_chans], "std": INPUT["std"][:in_chans]}
    asked["input_size"] = (in_chans, 48, 48)
    card = Card(name, model_kwargs, 3, in_chans, data_config(model, asked), "RGB", NAMES)
    save_weights(path, model.state_dict(), card)
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    path = tmp_path_factory.mktemp("trained") / "best.safetensors"
    return path, save(path, "test_ravlt")


def create(path: Path, name: str = "test_ravlt", overlay: dict | None = None, **kwargs):
    overlay = {"file": str(path), **(overlay or {})}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def same(model: torch.nn.Module, trained: torch.nn.Module, size=(2, 3, 48, 48)) -> None:
    """Compares outputs, input and classes with those of a model that `save` returned."""
    x = torch.randn(size)
    assert torch.equal(model(x), trained(x))
    expected = {**INPUT, "mean": INPUT["mean"][: size[1]], "std": INPUT["std"][: size[1]]}
    expected["input_size"] = size[1:]
    got = resolve_model_data_config(model)
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in got.items()} == expected
    assert list(model.pretrained_cfg["label_names"]) == NAMES
    assert model.num_classes == model.pretrained_cfg["num_classes"] == 3


WAYS = {
    "load": vitlinear.load,
    "file": create,
    "file and classes": lambda path: create(path, num_classes=3),
    "file of another tag": lambda path: create(path, overlay={"tag": "mine"}),
}


@pytest.mark.quick
@pytest.mark.parametrize("way", WAYS)
def test_a_run_keeps_its_input_and_names(trained, tmp_path, way):
    path, expected = trained
    model = WAYS[way](path)
    same(model, expected)
    save_for_hf(model, tmp_path / "hub", safe_serialization=True)
    same(timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval(), expected)


@pytest.mark.parametrize("name", ["test_inline_deit", "test_lightnet", "resnet10t"])
def test_so_does_one_of_other_sizes_or_of_timm(tmp_path, name):
    """One channel, positions of the images of training, a model that is not ours."""
    path, kwargs = tmp_path / "w.safetensors", {}
    if name == "test_inline_deit":
        kwargs = {"img_size": [48, 48]}
    expected = save(path, name, in_chans=1, **kwargs)
    model = vitlinear.load(path)
    same(model, expected, (2, 1, 48, 48))
    save_for_hf(model, tmp_path / "hub", safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    same(again, expected, (2, 1, 48, 48))


def test_arguments_of_training_are_those_of_the_model(tmp_path):
    """Those that the variant leaves alone are taken from the file, and saved with the model."""
    path = tmp_path / "w.safetensors"
    expected = save(path, "test_inline_deit", img_size=[48, 48], mlp_ratio=2.0)
    with pytest.warns(Notice, match=r"img_size=\[48, 48\].*vitlinear.load"):
        model = create(path, "test_inline_deit")
    assert model.blocks[0].mlp.fc1.out_features == 128
    same(create(path, "test_inline_deit", img_size=48), expected)
    save_for_hf(create(path, "test_inline_deit", img_size=48), tmp_path / "hub")
    same(timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval(), expected)


def test_what_the_caller_says_goes_before_the_file(trained):
    path, expected = trained
    model = create(path, overlay={"mean": (0.5, 0.5, 0.5), "num_classes": -1}, num_classes=3)
    assert resolve_model_data_config(model)["mean"] == (0.5, 0.5, 0.5)
    assert not torch.equal(model.head.fc.bias, expected.head.fc.bias)  # timm's way to ask for it
    five = create(path, num_classes=5)
    assert five.num_classes == 5 and five.pretrained_cfg["num_classes"] == 3
    assert torch.equal(five.final.conv.weight, expected.final.conv.weight)
    assert create(path, features_only=True)(torch.randn(1, 3, 64, 64))[0].shape[1] > 0


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 3}])
@pytest.mark.filterwarnings("ignore::vitlinear.errors.Notice")
def test_a_classifier_that_fits_is_loaded_from_any_file(trained, tmp_path, prefix, kwargs):
    """timm drops it where the registry's weights have another number of classes."""
    weights = {f"{prefix}{key}": value for key, value in trained[1].state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "plain.pth")
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(create(tmp_path / "plain.pth", **kwargs)(x), trained[1](x))


def test_another_model_than_the_files_is_told(trained):
    with pytest.warns(Notice, match="is of model test_ravlt, .*test_ravlt_linear.*vitlinear.load"):
        create(trained[0], "test_ravlt_linear")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        create(trained[0], attn_backend="eager")


def test_arguments_that_change_no_shape_are_told_or_taken(tmp_path):
    """Windows of another size: the weights fit, and another function is computed."""
    path = tmp_path / "w.safetensors"
    expected = save(path, "test_l2vit", window_size=2)
    x = torch.randn(2, 3, 64, 64)
    taken = MultiScaleBackbone("test_l2vit", checkpoint_path=path).eval()
    maps = expected.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(taken(x), maps, strict=True))
    for way in (
        lambda: create(path, "test_l2vit", window_size=4),
        lambda: MultiScaleBackbone("test_l2vit", checkpoint_path=path, window_size=4),
        lambda: initial_weights(build_model("test_l2vit", num_classes=3), path, "test_l2vit"),
    ):
        with pytest.warns(Notice, match="is of window_size=2, .*vitlinear.load"):
            way()


def test_load_takes_other_files_with_their_model(trained, tmp_path):
    torch.save(trained[1].state_dict(), tmp_path / "plain.pth")
    with pytest.raises(UserError, match="does not say which model it is"):
        vitlinear.load(tmp_path / "plain.pth")
    model = vitlinear.load(tmp_path / "plain.pth", model="test_ravlt", num_classes=3)
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(model(x), trained[1](x)) and not model.training
