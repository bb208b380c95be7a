"""``vitlinear validate``."""

import json
from pathlib import Path

import pytest
import timm
import torch

from tests.commands import Command
from tests.train.helpers import CLASSES
from vitlinear.checkpoints.card import read_card


def test_a_checkpoint_alone_repeats_the_metric_of_training(
    command: Command, images: Path, checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "results.json"
    flags = ("--checkpoint", checkpoint, "--data-dir", images, "-j", 0, "--results-file", file)
    result = command("validate", *flags, "--per-class", "-b", 4)
    assert result.code == 0 and result.err == ""
    report, card = json.loads(file.read_text()), read_card(checkpoint)
    assert card is not None
    assert report["top1"] == pytest.approx(card.metric["top1"]) and report["top5"] == 100.0
    assert (report["images"], report["model"]) == (9, "test_ravlt")
    assert [row["class"] for row in report["per_class"]] == list(CLASSES)
    assert sum(row["correct"] for row in report["per_class"]) * 100 / 9 == report["top1"]
    assert f"top-1 {report['top1']:.2f} %, top-5 100.00 %" in result.out
    table = result.out.splitlines()[1:]
    assert table[0].split() == ["class", "images", "correct", "top-1", "%"]
    assert [line.split()[0] for line in table[1:]] == list(CLASSES)


def test_published_weights_without_checkpoint(
    command: Command, images: Path, checkpoint: Path, tmp_path: Path
) -> None:
    assert command("push", checkpoint, tmp_path / "hub").code == 0
    flags = ("--model", f"local-dir:{tmp_path / 'hub'}", "--pretrained", "-j", 0)
    result = command("validate", *flags, "--data-dir", images)
    assert result.code == 0, result.err
    assert "on 9 images" in result.out


def test_a_checkpoint_of_timm(command: Command, images: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=3)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "net.pth")
    flags = ("--model", "test_resnet", "--num-classes", 3, "-j", 0, "--data-dir", images)
    result = command("validate", "--checkpoint", tmp_path / "net.pth", *flags)
    assert result.code == 0, result.err


def test_another_input_size_and_precision(command: Command, images: Path, checkpoint: Path) -> None:
    flags = ("--checkpoint", checkpoint, "--data-dir", images, "-j", 0, "--img-size", 48)
    result = command("validate", *flags, "--amp", "--amp-dtype", "bfloat16", "--channels-last")
    assert result.code == 0, result.err
