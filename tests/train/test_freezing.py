"""Starting from weights: layer decay, freezing, a new head, another resolution."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from tests.train.helpers import TINY, tiny_flags, train
from vitlinear.checkpoints.load import read_weights
from vitlinear.errors import UserError
from vitlinear.models import our_models
from vitlinear.processes import Processes
from vitlinear.train import setup
from vitlinear.train.freezing import freeze
from vitlinear.train.parallel import synchronised
from vitlinear.train.run import parse_arguments
from vitlinear.train.start_weights import initialise_head

# One model of each kind; the siblings that attend linearly in every stage have the same layers.
FAMILIES = [
    name for name in our_models() if name.startswith("test_") and not name.endswith("_linear")
]


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_decay_grows_from_the_stem_to_the_head(name: str) -> None:
    """One step a block; the stem below the first block, the last norm with the last block."""
    model = timm.create_model(name, device="meta")
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scales = {id(value): group["lr_scale"] for group in groups for value in group["params"]}
    found = [(parameter, scales[id(value)]) for parameter, value in model.named_parameters()]
    found.sort(key=lambda pair: pair[0].startswith("head."))  # some register it before the blocks
    assert [scale for _, scale in found] == sorted(scale for _, scale in found)
    blocks: dict[str, set[float]] = {}
    for parameter, scale in found:
        if ".norm1." in parameter or ".pos." in parameter:
            blocks.setdefault(parameter.rsplit(".", 2)[0], set()).add(scale)
    depth = len(model.feature_info) if hasattr(model, "blocks") else 0
    depth = depth or sum(len(stage.blocks) for stage in model.stages)
    assert len({scale for _, scale in found}) == depth + 2
    assert found[0][1] == 0.5 ** (depth + 1)
    heads = [scale for parameter, scale in found if parameter.startswith("head.")]
    assert set(heads) == {1.0} and len(heads) == 2
    assert all(len(of_block) == 1 for of_block in blocks.values())


def small(name: str = "test_ravlt") -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, drop_path_rate=0.5, **TINY)


def test_frozen_parts_stay_as_they_are() -> None:
    model = small()
    count = freeze(model, ["stem", "stages.[01].blocks.*", "stages.2.blocks.0.ls?.gamma"])
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert count == sum(value.numel() for value in model.parameters() if not value.requires_grad)
    assert {name.split(".")[0] for name in frozen} == {"stem", "stages"}
    assert (
        "stages.2.blocks.0.ls1.gamma" in frozen and "stages.1.downsample.conv.weight" not in frozen
    )
    for copied in (model, copy.deepcopy(model)):
        before = {name: value.clone() for name, value in copied.state_dict().items()}
        copied.train()
        optimizer = torch.optim.SGD(copied.parameters(), lr=1.0)
        copied(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        changed = {
            name
            for name, value in copied.state_dict().items()
            if not torch.equal(value, before[name])
        }
        assert not any(name in frozen or name.startswith("stem.") for name in changed)
        assert "stages.1.downsample.bn.running_mean" in changed, "what is not frozen counts on"
        assert "head.fc.weight" in changed
        modes = dict(copied.named_modules())
        assert not modes["stem.conv1.bn"].training and not modes["stages.1.blocks.0"].training
        assert (
            modes["stages.2.blocks.0"].training and modes["stages.1"].training and copied.training
        )


def test_norms_of_frozen_parts_are_frozen_after_they_are_synchronised(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Synchronised norms are new modules."""
    joined = (torch.device("cpu"), Processes(world_size=2))
    monkeypatch.setattr(setup, "join_processes", lambda *_: joined)
    monkeypatch.setattr(
        setup, "synchronised", lambda model, _: synchronised(model, torch.device("cuda"))
    )
    monkeypatch.setattr(setup, "distribute", lambda *_, **__: None)
    flags = tiny_flags(folder, tmp_path / "run", "-b", 4, "--sync-bn", "--freeze", "stem.conv1.bn")
    run = setup.set_up(parse_arguments(flags))
    assert "8 parameters are frozen" in run.notes
    model = run.task.get_trainable_module().train()
    norms = {k: v for k, v in model.named_modules() if isinstance(v, nn.SyncBatchNorm)}
    assert [name for name, norm in norms.items() if not norm.training] == ["stem.conv1.bn"]
    assert len(norms) > 1


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["stem", "stagse.0"], "--freeze stagse.0 matches no parameter .*did you mean.*stages.0"),
        (["*.gama"], "its parts are stem, stages, final, head"),
        (["stage"], "matches no parameter"),
        (["*"], "leaves nothing to train"),
    ],
)
def test_patterns_that_cannot_be_meant(patterns: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        freeze(small(), patterns)


def test_frozen_run_from_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    """Weights, running statistics and average of frozen parts leave a run as they came."""
    train(folder, tmp_path / "a", "--epochs", 1)
    start = tmp_path / "a" / "last.safetensors"
    flags = ("--initial-checkpoint", start, "--freeze", "stem", "stages.0", "--model-ema")
    flags += ("--weight-decay", 0.5, "--layer-decay", 0.7, "--grad-checkpointing", "--clip-grad", 1)
    train(folder, tmp_path / "b", *flags, "--clip-mode", "agc")
    before, after = read_weights(start), read_weights(tmp_path / "b" / "last.safetensors")
    for name, value in before.items():
        if name.startswith(("stem.", "stages.0.")):
            assert torch.equal(value, after[name]), name
    for name in ("stages.1.downsample.bn.running_mean", "head.fc.weight"):
        assert not torch.equal(before[name], after[name])


def test_initialising_the_head() -> None:
    model, other = small(), small()
    initialise_head(model, 0.001, -2.0)
    torch.testing.assert_close(model.head.fc.weight, other.head.fc.weight * 0.001)
    assert torch.equal(model.head.fc.bias, torch.full((3,), -2.0))
    assert torch.equal(model.stem.conv1.conv.weight, other.stem.conv1.conv.weight)
    with pytest.raises(UserError, match="no classifier"):
        initialise_head(timm.create_model("test_ravlt", num_classes=0), 0.1, None)


@pytest.mark.parametrize("name", ["test_linear_deit", "test_inline_pvt"])
def test_another_resolution_and_another_head(folder: Path, tmp_path: Path, name: str) -> None:
    """From 32 to 64 pixels and 5 to 3 classes: positions are resized, the head starts anew."""
    torch.manual_seed(0)
    start = tmp_path / "start.pt"
    source = timm.create_model(name, num_classes=5, img_size=32)
    torch.save(source.state_dict(), start)
    flags = ("--model", name, "--model-kwargs", "drop_path_rate=0", "--img-size", 64)
    flags += ("--initial-checkpoint", start, "--lr", 0, "--warmup-lr", 0, "--min-lr", 0)
    train(folder, tmp_path / "run", *flags)
    before, after = source.state_dict(), read_weights(tmp_path / "run" / "last.safetensors")
    resized = {key for key, value in before.items() if value.shape != after[key].shape}
    heads = {key for key in resized if key.startswith("head.")}
    assert heads and all(after[key].shape[0] == 3 for key in heads)
    assert resized - heads == {key for key in before if key.endswith("pos_embed")}
    for key in before.keys() - resized:
        assert torch.equal(before[key], after[key]), key
