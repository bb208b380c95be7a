"""Weights that describe themselves, written whole or not at all."""

import json
import stat
from pathlib import Path

import pytest
import safetensors
import torch

from tests.golden import upstream_state_dict, variants
from tests.train.helpers import TINY
from vitlinear.checkpoints.card import Card, read_card, save_weights
from vitlinear.checkpoints.load import load_model, read_weights
from vitlinear.create import build_model, data_config
from vitlinear.errors import UserError
from vitlinear.files import write_atomically, write_text
from vitlinear.train.record.saved_state import read_state, save_state
from vitlinear.train.start_weights import initial_weights


def small(num_classes: int = 3, in_chans: int = 3) -> torch.nn.Module:
    return build_model("test_ravlt", num_classes=num_classes, in_chans=in_chans, **TINY)


def card_of(net: torch.nn.Module, **changes: object) -> Card:
    values = {
        "model": "test_ravlt",
        "model_kwargs": TINY,
        "num_classes": 3,
        "in_chans": 3,
        "data_config": data_config(net, {"img_size": 32}),
        "image_mode": "RGB",
        "class_names": ["a", "b", "c"],
        "metric": {"top1": 50.0},
    }
    return Card(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    net = small()
    path = tmp_path / "best.safetensors"
    save_weights(path, net.state_dict(), card_of(net))
    return path


def test_a_file_alone_gives_model_and_card_back(tmp_path: Path) -> None:
    net = small(in_chans=1).eval()
    path = tmp_path / "w.safetensors"
    save_weights(path, net.state_dict(), card_of(net, in_chans=1, image_mode="L"))
    again, card = load_model(path)
    assert card is not None and card.class_names == ["a", "b", "c"] and card.in_chans == 1
    assert card.data_config.input_size == (1, 32, 32)
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(net(images), again(images))
    # timm itself reads the file, and so does anything that reads safetensors
    assert read_weights(path).keys() == net.state_dict().keys()
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["vitlinear"])["model"] == "test_ravlt"


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def broken(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, broken)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_text(path, "new")
    assert path.read_text() == "new"
    with pytest.raises(UserError, match="cannot write .*none/file.txt: No such file"):
        write_text(tmp_path / "none" / "file.txt", "x")


def test_files_have_ordinary_permissions(saved: Path, tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_truncated_weights_are_named(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(UserError, match="best.safetensors is truncated, corrupt or not"):
        load_model(saved)


def test_wrong_files_are_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.safetensors does not exist"):
        load_model(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="is of test_ravlt, not ravlt_t"):
        load_model(saved, model="ravlt_t")
    with pytest.raises(UserError, match="has --num-classes 3, not 4"):
        load_model(saved, num_classes=4)
    with pytest.raises(UserError, match="has --in-chans 3, not 1"):
        load_model(saved, in_chans=1)
    foreign = tmp_path / "foreign.pth"
    torch.save(small().state_dict(), foreign)
    with pytest.raises(UserError, match="does not say which model it is: give --model"):
        load_model(foreign)
    with pytest.raises(UserError, match="does not fit test_ravlt: "):
        load_model(foreign, model="test_ravlt", num_classes=3)
    net, card = load_model(foreign, model="test_ravlt", num_classes=3, model_kwargs=TINY)
    assert card is None
    foreign.write_bytes(b"not a pickle")
    with pytest.raises(UserError, match="foreign.pth is truncated, corrupt or not"):
        load_model(foreign, model="test_ravlt")
    foreign.write_bytes(b"")
    with pytest.raises(UserError, match="foreign.pth is truncated, corrupt or not"):
        load_model(foreign, model="test_ravlt")
    state = tmp_path / "last_state.pt"
    save_state(state, {"epoch": 1})
    with pytest.raises(UserError, match="training state .*give best.safetensors"):
        load_model(state, model="test_ravlt")


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("code ran",))

    for name in ("weights.pth", "last_state.pt"):
        torch.save({"state_dict": Bomb(), "version": 1}, tmp_path / name)
    with pytest.raises(UserError, match="needs code .* refused"):
        load_model(tmp_path / "weights.pth", model="test_ravlt")
    with pytest.raises(UserError, match="cannot resume"):
        read_state(tmp_path / "last_state.pt")


def test_initial_weights_keep_the_body_and_drop_a_head_that_does_not_fit(saved: Path) -> None:
    same = small()
    assert not initial_weights(same, saved, "test_ravlt")
    weights = read_weights(saved)
    assert all(torch.equal(weights[key], value) for key, value in same.state_dict().items())
    other = small(num_classes=7)
    assert initial_weights(other, saved, "test_ravlt")
    for key, value in other.state_dict().items():
        assert key.startswith("head.fc.") or torch.equal(weights[key], value)
    with pytest.raises(UserError, match="does not fit test_ravlt"):
        initial_weights(build_model("test_ravlt", num_classes=3), saved, "test_ravlt")
    with pytest.raises(UserError, match="is of test_ravlt, not ravlt_t"):
        initial_weights(same, saved, "ravlt_t")


@pytest.mark.parametrize(
    ("made", "remedy"),
    [
        ({"num_classes": 7}, "give --num-classes 7"),
        ({"in_chans": 4}, "give --in-chans 4"),
        ({"num_classes": 7, "in_chans": 4}, "give the --model and --model-kwargs it was made with"),
    ],
)
def test_what_makes_weights_fit_is_said(tmp_path: Path, made: dict, remedy: str) -> None:
    path = tmp_path / "net.pth"
    torch.save(small(**made).state_dict(), path)
    with pytest.raises(UserError, match=f"net.pth does not fit test_ravlt: .*; {remedy}$"):
        load_model(path, model="test_ravlt", num_classes=3, model_kwargs=TINY)
    load_model(path, model="test_ravlt", **{"num_classes": 3, **made}, model_kwargs=TINY)


def test_a_tag_says_nothing_of_the_model(tmp_path: Path) -> None:
    path, net = tmp_path / "net.safetensors", build_model("ravlt_t", num_classes=3, **TINY)
    save_weights(path, net.state_dict(), card_of(net, model="ravlt_t.in1k"))
    assert not initial_weights(net, path, "ravlt_t")
    assert load_model(path, model="ravlt_t")[1] == read_card(path)
    with pytest.raises(UserError, match="is of ravlt_t.in1k, not ravlt_s"):
        load_model(path, model="ravlt_s.in1k")


def test_initial_weights_of_the_authors(tmp_path: Path) -> None:
    """Fine-tuning from a released file: names translated, its classifier left out."""
    released = upstream_state_dict(variants("rala")["RAVLT_T"]["state_dict"])
    torch.save({"model": released}, tmp_path / "RAVLT_T.pth")
    model = build_model("ravlt_t", num_classes=3)
    assert initial_weights(model, tmp_path / "RAVLT_T.pth", "ravlt_t")
    expected = released["layers.2.blocks.0.attn.proj.bias"].float()
    assert torch.equal(model.get_parameter("stages.2.blocks.0.attn.proj.bias"), expected)


def test_checkpoint_without_weights(tmp_path: Path) -> None:
    path = tmp_path / "epoch.pth"
    torch.save({"epoch": 3}, path)
    with pytest.raises(UserError, match="no weights in this checkpoint"):
        load_model(path, model="test_ravlt")


def test_state_round_trip_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "last_state.pt"
    save_state(path, {"epoch": 3, "tensor": torch.arange(4), "args": {"lr": None, "b": [1, 2]}})
    state = read_state(path)
    assert state["epoch"] == 3 and torch.equal(state["tensor"], torch.arange(4))
    raw = path.read_bytes()
    for damaged in (b"", raw[:10], raw[: len(raw) // 2], raw[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot resume: .*last_state.pt"):
            read_state(path)
    torch.save([1], path)
    with pytest.raises(UserError, match="not a training state of this version"):
        read_state(path)
    assert read_card_of_foreign(tmp_path) is None


def read_card_of_foreign(tmp_path: Path) -> Card | None:
    path = tmp_path / "plain.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    return read_card(path)
