"""One walk through the commands: each does its work on what another wrote."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.commands import Command
from tests.golden import upstream_state_dict, variants
from tests.train.helpers import CLASSES, tiny_flags
from vitlinear.checkpoints.card import read_card


@pytest.mark.quick(
    "cards", "checkpoints", "cli", "convert", "data", "evaluation", "export", "models", "train"
)
def test_from_a_data_set_to_a_file_for_others(
    command: Command, images: Path, tmp_path: Path
) -> None:
    def done(*arguments: object) -> str:
        result = command(*arguments)
        assert (result.code, result.err) == (0, ""), arguments
        return result.out

    assert "test_ravlt" in done("list", "--all").split()
    assert json.loads(done("info", "ravlt_t", "--json"))["model"] == "ravlt_t"
    done("check-data", "--data-dir", images, "-j", 0)

    run = tmp_path / "run"
    done("train", *tiny_flags(images, run, "--epochs", 1))
    weights = run / "last.safetensors"
    results = tmp_path / "results.json"
    flags = ("--checkpoint", weights, "--data-dir", images, "-j", 0, "--results-file", results)
    done("validate", *flags)
    card = read_card(weights)
    assert card is not None and card.metric is not None
    assert json.loads(results.read_text())["top1"] == pytest.approx(card.metric["top1"])
    guesses = json.loads(done("predict", images / "val", "--checkpoint", weights, "--json"))
    assert len(guesses) == 9 and guesses[0]["predictions"][0]["class"] in CLASSES

    exported = tmp_path / "exported.safetensors"
    done("export", "test_ravlt", exported, "--checkpoint", weights)
    ours, theirs = (safetensors.torch.load_file(path) for path in (weights, exported))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    released = upstream_state_dict(variants("rala")["RAVLT_T"]["state_dict"])
    torch.save({"model": released}, tmp_path / "RAVLT_T.pth")
    assert "ravlt_t.in1k" in done(
        "convert", tmp_path / "RAVLT_T.pth", tmp_path / "ours.safetensors"
    )
