"""Files that a command is given: none can have it run code; those of mmdet are in tests/dense."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.commands import Command
from tests.payload import Payload
from tests.train.helpers import TINY_FLAGS
from vitlinear.create import build_model
from vitlinear.dense.backbone import MultiScaleBackbone
from vitlinear.dense.torchvision import fpn_backbone
from vitlinear.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bomb(tmp_path: Path) -> Path:
    """A checkpoint with code; running it leaves a file named ``ran`` beside it."""
    path = tmp_path / "bomb.pth"
    torch.save({"state_dict": {"x": torch.zeros(2, 2)}, "o": Payload(tmp_path / "ran")}, path)
    return path


TRAIN = ("train", "--dataset", "digits", "--epochs", 1, "-j", 0, *TINY_FLAGS)
DIGITS = ("--dataset", "digits", "-j", 0)
OVERLAY = "pretrained_cfg_overlay={{'file':'{bomb}'}}"


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "{bomb}", "{out}/a.safetensors"),
        ("validate", "--checkpoint", "{bomb}", "--model", "test_ravlt", *DIGITS),
        ("predict", "{image}", "--checkpoint", "{bomb}", "--model", "test_ravlt"),
        ("predict", "{image}", "--checkpoint", "{bomb}", "--model", "resnet18"),
        ("export", "test_ravlt", "{out}/a.onnx", "--checkpoint", "{bomb}"),
        (*TRAIN, "--initial-checkpoint", "{bomb}"),
        (*TRAIN, "--resume", "{bomb}"),
        (*TRAIN, "--kd-model-name", "test_ravlt", "--kd-checkpoint", "{bomb}"),
        (*TRAIN, "checkpoint_path={bomb}"),  # a flag's work, and said so
        (*TRAIN, OVERLAY, "--pretrained"),
        (*TRAIN, "--model", "test_vit", "--model-kwargs", OVERLAY, "--pretrained"),
    ],
    ids=lambda words: " ".join(str(word) for word in (words[0], *words[-2:])).replace("/", " "),
)
def test_a_command_refuses(
    words: tuple[object, ...], bomb: Path, images: Path, command: Command, tmp_path: Path
) -> None:
    image = images / "val/ant/0.png"
    argv = [str(word).format(bomb=bomb, image=image, out=tmp_path) for word in words]
    if argv[0] == "train":
        argv += ["--output", str(tmp_path / "run")]
    result = command(*argv)
    assert result.code == 2, result
    error = result.err.splitlines()[-1]
    assert error.startswith("error: ")
    assert any(part in error for part in ("bomb.pth", "builtins.exec", "--initial-checkpoint"))
    assert not (tmp_path / "ran").exists()
    torch.load(bomb, weights_only=False)
    assert (tmp_path / "ran").exists()  # the file does what it should, were it read otherwise


@pytest.mark.parametrize(
    "build",
    [
        lambda bomb: MultiScaleBackbone("test_ravlt", checkpoint_path=bomb),
        lambda bomb: MultiScaleBackbone("test_vit", checkpoint_path=bomb),
        lambda bomb: fpn_backbone("test_ravlt", checkpoint_path=bomb),
        lambda bomb: fpn_backbone(
            "test_ravlt", pretrained=True, pretrained_cfg_overlay={"file": str(bomb)}
        ),
        lambda bomb: build_model("test_ravlt", checkpoint_path=str(bomb)),
    ],
)
def test_a_backbone_refuses(build: Callable[[Path], object], bomb: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bomb\.pth|builtins\.exec"):
        build(bomb)
    assert not (tmp_path / "ran").exists()


READER = "vitlinear/checkpoints/read.py"
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SOURCES = sorted(
    path
    for pattern in ("vitlinear/**/*.py", "tools/*.py", "benchmarks/**/*.py", "*.py")
    for path in ROOT.glob(pattern)
)


@pytest.mark.quick
def test_only_the_reader_unpickles() -> None:
    """Elsewhere stands no call of what unpickles; the names of its errors may."""
    found = []
    for path in SOURCES:
        where = path.relative_to(ROOT).as_posix()
        if where == READER:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in UNPICKLERS:
                found.append(f"{where}:{node.lineno}: from {node.module}")
            if isinstance(node, ast.Call) and (name := _unsafe(node.func)):
                found.append(f"{where}:{node.lineno}: {name}")
    assert not found


def _unsafe(function: ast.expr) -> str | None:
    name = ast.unparse(function)
    owner, _, method = name.rpartition(".")
    loads = method in ("load", "loads", "Unpickler") and owner in {"torch", *UNPICKLERS}
    loaders = method in ("load_checkpoint", "load_state_dict_from_url", "load_url", "unsafe_load")
    return name if loads or loaders else None
