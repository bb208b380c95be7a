"""Keys under a wrapper's prefix: they load without it, everywhere alike, and a notice says so."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tests.commands import Command
from tests.golden import upstream_state_dict, variants
from tests.train.helpers import fork_command
from vitlinear.checkpoints.load import load_model
from vitlinear.create import build_model
from vitlinear.dense.backbone import MultiScaleBackbone
from vitlinear.errors import Notice, UserError
from vitlinear.train.start_weights import initial_weights

MODEL = "test_ravlt"
PREFIXES = ["model.", "net.", "encoder.", "model._orig_mod.", "backbone.", "module.model.", "a.b."]


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    return build_model(MODEL, num_classes=5).eval()


def overlay(path: Path) -> nn.Module:
    cfg = {"file": str(path)}
    return timm.create_model(MODEL, pretrained=True, num_classes=5, pretrained_cfg_overlay=cfg)


def initial(path: Path) -> nn.Module:
    model = build_model(MODEL, num_classes=5)
    assert not initial_weights(model, path, MODEL)  # with its classifier
    return model


WAYS = {
    "overlay": overlay,
    "load_model": lambda path: load_model(path, model=MODEL, num_classes=5)[0],
    "initial_weights": initial,
    "backbone": lambda path: MultiScaleBackbone(MODEL, checkpoint_path=path).model,
}


def equal(model: nn.Module, trained: nn.Module) -> bool:
    weights = trained.state_dict()
    return all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_before_every_key(trained, tmp_path, prefix, way):
    weights = {f"{prefix}{key}": value for key, value in trained.state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "in.ckpt")
    shown = prefix.removeprefix("module.").replace(".", r"\.")
    with pytest.warns(Notice, match=f"begins with '{shown}'"):
        assert equal(WAYS[way](tmp_path / "in.ckpt"), trained)


@pytest.mark.parametrize("way", WAYS)
def test_an_averaged_model(trained, tmp_path, way):
    averaged = AveragedModel(trained)
    torch.save(averaged.state_dict(), tmp_path / "in.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)  # `module.` is everywhere known
        assert equal(WAYS[way](tmp_path / "in.pth"), trained)
    wrapped = AveragedModel(nn.ModuleDict({"net": trained}))
    torch.save({"state_dict": wrapped.state_dict()}, tmp_path / "in.pth")
    with pytest.warns(Notice, match="begins with 'net.'"):
        assert equal(WAYS[way](tmp_path / "in.pth"), trained)


@pytest.mark.parametrize("prefix", ["model.", "net._orig_mod.", "backbone."])
def test_convert(command: Command, tmp_path, prefix):
    """Also in the layout of the authors, and for the commands that evaluate."""
    released = upstream_state_dict(variants("rala")["RAVLT_T"]["state_dict"])
    torch.save({f"{prefix}{key}": value for key, value in released.items()}, tmp_path / "in.pth")
    result = command(
        "convert", tmp_path / "in.pth", tmp_path / "out.safetensors", "--model", "ravlt_t"
    )
    assert result.code == 0 and f"without '{prefix}'" in result.out
    weights = safetensors.torch.load_file(tmp_path / "out.safetensors")
    stem = released["patch_embed.proj.0.weight"]
    assert torch.equal(weights["stem.conv1.conv.weight"], stem)
    with pytest.warns(Notice, match=f"begins with '{prefix}'"):
        again, _ = load_model(tmp_path / "in.pth", model="ravlt_t")
    assert torch.equal(again.stem.conv1.conv.weight, stem.float())


@pytest.mark.process
def test_a_command_prints_it_as_a_line(trained, images, tmp_path):
    weights = {f"net.{key}": value for key, value in trained.state_dict().items()}
    torch.save(weights, tmp_path / "in.pth")
    image = next(images.rglob("*.png"))
    flags = ["--checkpoint", tmp_path / "in.pth", "--model", MODEL, "--num-classes", "5"]
    code, out, err = fork_command("predict", image, *flags)
    assert code == 0 and out
    assert err == (
        "note: every key of the checkpoint begins with 'net.': weights are taken without it\n"
    )


def test_a_detector_that_a_wrapper_holds(trained, tmp_path):
    """Its stages are taken, and the classifier is new; also where it has no heads."""
    body = {k: v for k, v in trained.state_dict().items() if not k.startswith(("head.", "final."))}
    for more in ({"model.neck.fpn.weight": torch.ones(2)}, {}):
        weights = {f"model.backbone.{key}": value for key, value in body.items()} | more
        torch.save({"state_dict": weights}, tmp_path / "in.pth")
        model = build_model(MODEL, num_classes=3)
        with pytest.warns(Notice, match="begins with 'model."):
            assert initial_weights(model, tmp_path / "in.pth", MODEL)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in body.items())


def test_what_fits_under_no_prefix_is_refused_as_before(trained, tmp_path):
    two = {
        f"{part}.{k}": v for part in ("student", "teacher") for k, v in trained.state_dict().items()
    }
    torch.save(two, tmp_path / "in.pth")
    with pytest.raises(UserError, match="none of its weights is one of RAVLT's"):
        load_model(tmp_path / "in.pth", model=MODEL, num_classes=5)
    partly = {f"net.{k}": v for k, v in trained.state_dict().items()} | {"net.more": torch.ones(2)}
    torch.save(partly, tmp_path / "in.pth")
    with (
        pytest.warns(Notice),
        pytest.raises(UserError, match="does not fit test_ravlt: unexpected more"),
    ):
        load_model(tmp_path / "in.pth", model=MODEL, num_classes=5)
