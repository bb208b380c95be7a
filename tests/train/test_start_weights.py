"""Weights that a run starts from, and what becomes of their classifier."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.train.helpers import CLASSES
from vitlinear.checkpoints.card import Card, save_weights
from vitlinear.checkpoints.load import read_weights
from vitlinear.create import build_model, data_config
from vitlinear.errors import UserError
from vitlinear.train import run
from vitlinear.train.setup import without_start_weights
from vitlinear.train.start_weights import initial_weights, normalisation_note, read_head_map

RECIPE = Path(__file__).parents[2] / "configs/classification/l2vit_base.in22k_ft_in1k.yaml"
ROWS = [4, 0, 2]  # class of the start weights, of seven, for each of three


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """Weights of a model of seven classes."""
    torch.manual_seed(1)
    weights = build_model("test_l2vit", num_classes=7).state_dict()
    weights["head.fc.bias"] = torch.arange(7.0)
    safetensors.torch.save_file(weights, tmp_path / "start.safetensors")
    return tmp_path / "start.safetensors"


@pytest.fixture
def head_map(tmp_path: Path) -> Path:
    path = tmp_path / "map.txt"
    path.write_text("".join(f"{row}\n" for row in ROWS))
    return path


def test_each_class_takes_the_row_that_the_map_names(start: Path, head_map: Path) -> None:
    model = build_model("test_l2vit", num_classes=3)
    assert not initial_weights(model, start, "test_l2vit", head_map)
    weights = read_weights(start)
    for key, value in model.state_dict().items():
        expected = weights[key][ROWS] if key.startswith("head.") else weights[key]
        assert torch.equal(value, expected), key


def test_a_map_of_as_many_classes_reorders_them(start: Path, tmp_path: Path) -> None:
    order = [6, 5, 4, 3, 2, 1, 0]
    (tmp_path / "order.txt").write_text(" ".join(map(str, order)))
    model = build_model("test_l2vit", num_classes=7)
    assert not initial_weights(model, start, "test_l2vit", tmp_path / "order.txt")
    assert model.state_dict()["head.fc.bias"].tolist() == order


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n2\n", "has 2 lines for 3 classes"),
        ("1\n-2\n0\n", "or a negative one"),
        ("", "has 0 lines for 3 classes"),
        ("n01440764\n", "needs a class number in each line"),
        ("0\n7\n1\n", "asks for class 7, but .*start.safetensors has only 7 classes"),
    ],
)
def test_bad_maps_say_what_is_wrong(start: Path, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "map.txt"
    path.write_text(text)
    model = build_model("test_l2vit", num_classes=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        initial_weights(model, start, "test_l2vit", path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_map_needs_a_file_and_a_classifier(start: Path, head_map: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read --initial-head-map none.txt: No such file"):
        read_head_map("none.txt", 3)
    weights = read_weights(start)
    body = {key: value for key, value in weights.items() if not key.startswith("head.")}
    safetensors.torch.save_file(body, tmp_path / "body.safetensors")
    model = build_model("test_l2vit", num_classes=3)
    with pytest.raises(UserError, match="has no classifier for --initial-head-map to read"):
        initial_weights(model, tmp_path / "body.safetensors", "test_l2vit", head_map)


def test_weights_of_another_model_only_where_that_is_said(tmp_path: Path) -> None:
    model = build_model("test_l2vit", num_classes=3)
    card = Card("test_l2vit", {}, 3, 3, data_config(model, {}), "RGB")
    save_weights(tmp_path / "other.safetensors", model.state_dict(), card)
    with pytest.raises(UserError, match="is of test_l2vit, not l2vit_tiny: .* --initial-model tes"):
        initial_weights(model, tmp_path / "other.safetensors", "l2vit_tiny")


def flags(data: Path, output: Path, *more: Any) -> list[str]:
    """The recipe for fine-tuning L2ViT, with the smallest L2ViT."""
    first = ["--config", RECIPE, "--model", "test_l2vit", "--data-dir", data, "--output", output]
    small = ["-b", 8, "-j", 0, "--stop-epoch", 1, "--img-size", 32, "--no-plot", "--device", "cpu"]
    return [str(flag) for flag in (*first, *small, *more)]


def test_fine_tuning_by_the_recipe_starts_from_the_mapped_classifier(
    folder: Path, tmp_path: Path, start: Path, head_map: Path
) -> None:
    """Two updates at its first rate, 4e-8, move nothing by more than that."""
    given = ["--initial-model", "test_l2vit", "--initial-checkpoint", start]
    command = flags(folder, tmp_path / "run", *given, "--initial-head-map", head_map)
    run.train(run.parse_arguments(command))
    state, weights = read_weights(tmp_path / "run" / "last.safetensors"), read_weights(start)
    assert len(state["head.fc.bias"]) == len(CLASSES)
    for key in ("head.fc.weight", "head.fc.bias"):
        torch.testing.assert_close(state[key], weights[key][ROWS], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "is to start from weights of l2vit_base: give --initial-checkpoint FILE"),
        (["--pretrained"], "of l2vit_base, and --pretrained fetches those of --model: give --init"),
        (["--initial-model", "l2vit_bose"], "unknown model 'l2vit_bose' .did you mean l2vit_base"),
        (["--initial-model", "l2vit_base", "--initial-checkpoint", "no.pth"], "no.pth does not ex"),
    ],
)
def test_a_run_without_its_start_weights_leaves_nothing(
    folder: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run.train(run.parse_arguments(flags(folder, tmp_path / "run", *more)))
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_does_not_need_its_start_weights(
    folder: Path, tmp_path: Path, start: Path, head_map: Path
) -> None:
    given = ["--initial-model", "test_l2vit", "--initial-checkpoint", start]
    command = flags(folder, tmp_path / "run", *given, "--initial-head-map", head_map)
    run.train(run.parse_arguments(command))
    start.unlink()
    head_map.unlink()
    command += ["--stop-epoch", "2", "--resume", "auto"]
    assert run.train(run.parse_arguments(command))["epoch"] == 2
    config = run.parse_arguments(["--model", "ravlt_t", "--pretrained"])
    assert not without_start_weights(config).model.pretrained


def test_a_map_without_start_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    command = ["--model", "test_l2vit", "--initial-head-map", "map.txt", "--data-dir", str(folder)]
    with pytest.raises(UserError, match="is for the classifier of --initial-checkpoint FILE"):
        run.train(run.parse_arguments([*command, "--output", str(tmp_path / "run")]))


def test_another_normalisation_than_that_of_the_start_weights_is_said(tmp_path: Path) -> None:
    model = build_model("test_l2vit", num_classes=3)
    path = tmp_path / "start.safetensors"
    config = data_config(model, {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)})
    save_weights(path, model.state_dict(), Card("test_l2vit", {}, 3, 3, config, "RGB"))
    assert normalisation_note(None, config) is normalisation_note(str(path), config) is None
    note = normalisation_note(str(path), dataclasses.replace(config, mean=(0.4, 0.5, 0.5)))
    assert note is not None
    assert note.endswith("otherwise; to keep that, give --mean 0.5 0.5 0.5 --std 0.25 0.25 0.25")
