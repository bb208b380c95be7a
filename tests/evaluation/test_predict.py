"""``vitlinear predict``."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from tests.commands import Command
from tests.golden import upstream_state_dict, variants
from tests.train.helpers import CLASSES, train
from vitlinear.checkpoints.card import Card, save_weights
from vitlinear.create import data_config
from vitlinear.data.dataset import export_sample
from vitlinear.evaluation.predict import _class_names


def test_files_and_folders(
    command: Command, images: Path, checkpoint: Path, tmp_path: Path
) -> None:
    one = images / "val" / "cat" / "2.png"
    flags = ("--checkpoint", checkpoint, "--json", "-b", 4)
    result = command("predict", one, images / "val", *flags, "--topk", 9)
    assert result.code == 0, result.err
    results = json.loads(result.out)
    assert [item["file"] for item in results[:2]] == [str(one), str(images / "val/ant/0.png")]
    assert len(results) == 10
    right = 0
    for item in results:
        guesses = item["predictions"]
        assert sorted(guess["class"] for guess in guesses) == list(CLASSES)
        values = [guess["probability"] for guess in guesses]
        assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(1, abs=1e-5)
        right += Path(item["file"]).parent.name == guesses[0]["class"]
    assert right >= 8  # a third would be chance
    # in batches or alone, the same answer
    alone = command("predict", one, "--checkpoint", checkpoint)
    first = results[0]["predictions"][0]
    assert alone.out.startswith(f"{one}: {first['class']} {100 * first['probability']:.1f} %")


def test_a_folder_of_the_hub_is_used_as_its_checkpoint(
    command: Command, images: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """With its preprocessing and its names."""
    assert command("push", checkpoint, tmp_path / "hub").code == 0
    flags = ("predict", images / "val", "--json")
    ours = json.loads(command(*flags, "--checkpoint", checkpoint).out)
    hub = command(*flags, "--model", f"local-dir:{tmp_path / 'hub'}", "--pretrained")
    assert json.loads(hub.out) == ours


def test_unreadable_images_are_left_out_when_asked(
    command: Command, images: Path, checkpoint: Path, tmp_path: Path
) -> None:
    good, empty = images / "val" / "cat" / "2.png", tmp_path / "empty.png"
    empty.touch()
    flags = ("--checkpoint", checkpoint, "-b", 1)
    result = command("predict", empty, good, *flags)
    assert result.code != 0 and result.out == ""
    assert f"cannot read image {empty}: the file is empty; replace or remove it" in result.err
    flags += ("--bad-images", "skip")
    for batch in (1, 8):
        result = command("predict", empty, good, good, *flags, "-b", batch)
        assert result.code == 0, result.err
        first, *others = result.out.splitlines()
        assert first == f"left out: {empty}: the file is empty"
        assert len(others) == 2 and all(line.startswith(f"{good}: ") for line in others)
    left, read = json.loads(command("predict", empty, good, *flags, "--json").out)
    assert left == {"file": str(empty), "unreadable": "the file is empty"}
    assert read["file"] == str(good) and len(read["predictions"]) == len(CLASSES)
    result = command("predict", empty, *flags)
    assert result.code != 0 and f"none of 1 images could be read; {empty}: " in result.err


def test_results_go_to_a_file_when_asked(
    command: Command, images: Path, checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "results.json"
    flags = ("--checkpoint", checkpoint, "--results-file", file, "--topk", 1)
    result = command("predict", images / "val", *flags)
    assert result.out == ""
    assert [len(item["predictions"]) for item in json.loads(file.read_text())] == [1] * 9


def test_a_grey_model_takes_colour_images(command: Command, images: Path, tmp_path: Path) -> None:
    train(images, tmp_path / "run", "--in-chans", 1, "--epochs", 1, "--mean", 0.5, "--std", 0.5)
    flags = ("--checkpoint", tmp_path / "run" / "last.safetensors")
    colour, grey = tmp_path / "colour.png", tmp_path / "grey.png"
    with Image.open(images / "val" / "ant" / "0.png") as image:
        image.save(colour)
        image.convert("L").save(grey)
    first, second = command("predict", colour, grey, *flags).out.splitlines()
    assert first.split(": ")[1] == second.split(": ")[1]


def test_an_image_mode_that_the_card_does_not_know(
    command: Command, images: Path, tmp_path: Path
) -> None:
    model = timm.create_model("test_ravlt", num_classes=3, in_chans=4)
    input = data_config(model, {"mean": [0.5] * 4, "std": [0.5] * 4})
    path = tmp_path / "four.safetensors"
    save_weights(path, model.state_dict(), Card("test_ravlt", {}, 3, 4, input, None))
    result = command("predict", images / "val", "--checkpoint", path)
    assert result.code == 2 and "name one with --input-img-mode (RGBA has 4)" in result.err
    flags = ("--checkpoint", path, "--input-img-mode", "RGBA")
    assert command("predict", images / "val", *flags).code == 0


def test_an_exported_digit(command: Command, tmp_path: Path) -> None:
    """The path of the quickstart: train on digits, export one, classify it."""
    from tests.train.helpers import TINY_FLAGS

    flags = ["--dataset", "digits", "--output", tmp_path / "run", *TINY_FLAGS, "--no-plot"]
    flags += ["--in-chans", 1, "--mean", 0.5, "--std", 0.5, "-j", 0, "--epochs", 1]
    result = command("train", *flags)
    assert result.code == 0, result.err
    label = export_sample("digits", 0, tmp_path / "digit.png")
    checkpoint = tmp_path / "run" / "best.safetensors"
    result = command("predict", "--checkpoint", checkpoint, tmp_path / "digit.png", "--topk", 10)
    assert result.code == 0, result.err
    names = [part.split()[0] for part in result.out.split(": ", 1)[1].split(", ")]
    assert sorted(names) == [str(digit) for digit in range(10)] and label in names
    # the checkpoint knows its data set
    result = command("validate", "--checkpoint", checkpoint, "-j", 0)
    assert result.code == 0 and "on 359 images" in result.out


def test_names_are_imagenets_only_where_the_tag_says_so() -> None:
    """The order of 22k classes is not the same everywhere, and a file may be of other classes."""
    for name, first in (("l2vit_tiny.in1k", "tench"), ("l2vit_base.in22k", "0")):
        with torch.device("meta"):
            model = timm.create_model(name)
        assert _class_names(model, None, pretrained=True)[0].startswith(first)
        assert _class_names(model, None, pretrained=False)[0] == "0"


def test_a_file_without_a_card_gets_numbers(command: Command, images: Path, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "net.pth")
    flags = ("--model", "test_resnet", "--checkpoint", tmp_path / "net.pth", "--topk", 1)
    result = command("predict", images / "val" / "ant" / "0.png", *flags, "--json")
    assert result.code == 0, result.err
    guess = json.loads(result.out)[0]["predictions"][0]
    assert guess["class"] == str(guess["index"])


def test_a_checkpoint_of_the_authors(command: Command, images: Path, tmp_path: Path) -> None:
    """The released file as it is: other names, a training checkpoint around the weights."""
    released = upstream_state_dict(variants("rala")["RAVLT_T"]["state_dict"])
    torch.save({"model": released, "epoch": 299}, tmp_path / "RAVLT_T.pth")
    flags = ("--checkpoint", tmp_path / "RAVLT_T.pth", "--model", "ravlt_t", "--img-size", 32)
    result = command("predict", *flags, "--topk", 2, "--json", images)
    assert result.code == 0, result.err
    assert all(len(row["predictions"]) == 2 for row in json.loads(result.out))
