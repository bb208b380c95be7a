"""Files that a config of mmdet or mmseg names: none can have a command run code."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoints import loopback
from tests.commands import Command
from tests.dense.openmmlab import detector, packages, segmentor
from tests.payload import Payload
from vitlinear.dense import ade, coco
from vitlinear.errors import UserError

pytestmark = packages()
pytest.importorskip("skimage")

import mmengine  # noqa: E402  (the lines above skip without it)
from mmengine.fileio.handlers import file_handlers  # noqa: E402
from mmengine.logging import HistoryBuffer, MessageHub  # noqa: E402
from mmengine.runner import load_checkpoint  # noqa: E402

from vitlinear.dense.openmmlab.reading import read_for_mmengine, safe_reading  # noqa: E402


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that is there once code has been run."""
    return tmp_path / "ran"


@pytest.fixture
def bomb(tmp_path: Path, marker: Path) -> Path:
    path = tmp_path / "bomb.pth"
    torch.save({"state_dict": {"x": torch.zeros(2, 2)}, "o": Payload(marker)}, path)
    (tmp_path / "last_checkpoint").write_text(str(path))
    return path


@pytest.fixture(scope="module", autouse=True)
def no_visualizer_is_left() -> Iterator[None]:
    """mmengine keeps one of a name for the whole process, with the folder of the first run."""
    from mmdet.visualization import DetLocalVisualizer
    from mmseg.visualization import SegLocalVisualizer

    yield
    for kind in (DetLocalVisualizer, SegLocalVisualizer):
        kind._instance_dict.clear()


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    coco.write_sample(folder / "coco")
    ade.write_sample(folder / "ade")
    averaged = "custom_hooks = [dict(type='EMAHook')]"
    detector(folder / "detector.py", folder / "coco", averaged)
    teacher = """
model.update(
    type="KnowledgeDistillationSingleStageDetector",
    teacher_config={teacher!r},
    teacher_ckpt="",
)
""".format(teacher=str(folder / "detector.py"))
    detector(folder / "student.py", folder / "coco", teacher)
    segmentor(folder / "segmentor.py", folder / "ade")
    return folder


def init(key: str) -> tuple[str, str]:
    """Options that have mmengine initialise a part of the model from the file."""
    return f"{key}.type=Pretrained", f"{key}.checkpoint={{bomb}}"


NAMES = ("detector", "student", "segmentor")
IMAGE = "{configs}/coco/images/chelsea.jpg"
OPTION = "--cfg-options"


@pytest.mark.parametrize(
    "words",
    [
        ("train-detector", "detector", OPTION, "load_from={bomb}"),
        ("train-detector", "detector", "--resume", "{bomb}"),
        ("train-detector", "detector", "--resume"),  # the last of the work folder
        ("train-detector", "detector", OPTION, *init("model.init_cfg")),
        ("train-detector", "detector", OPTION, *init("model.backbone.init_cfg")),
        ("train-detector", "student", OPTION, "model.teacher_ckpt={bomb}"),
        ("train-segmentor", "segmentor", OPTION, "load_from={bomb}"),
        ("test-detector", "detector", "{bomb}"),
        ("test-segmentor", "segmentor", "{bomb}"),
        ("predict", "--task", "detection", "detector", "{bomb}", IMAGE, "--out", "{work}/o"),
        ("predict", "--task", "segmentation", "segmentor", "{bomb}", IMAGE, "--out", "{work}/o"),
    ],
    ids=lambda words: " ".join((words[0], *words[-2:])).replace("/", " "),
)
def test_a_command_refuses(
    words: tuple[str, ...], configs: Path, bomb: Path, marker: Path, command: Command
) -> None:
    argv = [word.format(bomb=bomb, configs=configs, work=bomb.parent) for word in words]
    argv = [str(configs / f"{word}.py") if word in NAMES else word for word in argv]
    if argv[0] != "predict":
        argv[1:1] = ["--work-dir", str(bomb.parent)]
    result = command(*argv)
    assert result.code == 2, result
    error = result.err.splitlines()[-1]
    assert error.startswith("error: ") and "bomb.pth needs code" in error
    assert not marker.exists()


def test_the_config_in_a_checkpoint_is_not_run(
    configs: Path, tmp_path: Path, marker: Path, command: Command
) -> None:
    """A string, as harmless as any other to an unpickler; mmengine's runner executes it."""
    work = ("--work-dir", tmp_path)
    config = configs / "detector.py"
    assert command("train-detector", config, *work).code == 0
    content = torch.load(tmp_path / "epoch_1.pth", weights_only=False)
    content["meta"]["config"] = f"import pathlib\npathlib.Path({str(marker)!r}).touch()"
    torch.save(content, tmp_path / "changed.pth")
    more = ("--resume", tmp_path / "changed.pth", OPTION, "train_cfg.max_epochs=2")
    assert command("train-detector", config, *work, *more).code == 0
    assert (tmp_path / "epoch_2.pth").exists() and not marker.exists()
    # and the losses that were logged before are those that the run goes on with
    hub = content["message_hub"]
    again = read_for_mmengine(tmp_path / "changed.pth")["message_hub"]
    assert again["runtime_info"] == hub["runtime_info"]
    assert again["log_scalars"].keys() == hub["log_scalars"].keys() != set()
    for key, history in hub["log_scalars"].items():
        for ours, theirs in zip(again["log_scalars"][key].data, history.data, strict=True):
            assert np.array_equal(ours, theirs) and ours.dtype == theirs.dtype
    MessageHub("test_reading").load_state_dict(again)


def test_every_door_of_mmengine(bomb: Path, marker: Path, tmp_path: Path) -> None:
    annotations = {"data_list": [Payload(marker)], "metainfo": {}}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(annotations))
    (tmp_path / "a.yaml").write_text(f"a: !!python/object/apply:os.mkdir ['{marker}']")
    before = dict(file_handlers)
    ways: list[Callable[[], Any]] = [
        lambda: load_checkpoint(torch.nn.Linear(2, 2), str(bomb)),
        lambda: mmengine.runner.CheckpointLoader.load_checkpoint(str(bomb)),
        lambda: mmengine.load(tmp_path / "a.pkl"),
        lambda: mmengine.load(tmp_path / "a.yaml"),
        lambda: mmengine.load(io.BytesIO(pickle.dumps(annotations)), file_format="pickle"),
        lambda: torch.load(bomb, weights_only=False),
    ]
    for way in ways:
        with safe_reading(), pytest.raises((UserError, pickle.UnpicklingError)):
            way()
        assert not marker.exists()
    assert file_handlers == before
    mmengine.load(tmp_path / "a.pkl")
    assert marker.exists()  # outside, all is as it was


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_plain_data_are_read(protocol: int, tmp_path: Path) -> None:
    value = {
        "boxes": np.arange(6, dtype=np.float32).reshape(3, 2).T,
        "names": np.array(["a", "bc"]),
        "score": np.float64(0.5),
        "more": OrderedDict(a=(1, {2, 3}, b"x", None, True, slice(1, 2), 1j)),
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(value, protocol=protocol))
    with safe_reading():
        read = mmengine.load(tmp_path / "a.pkl")
        mmengine.dump(read, str(tmp_path / "b.pkl"))
        assert mmengine.load(tmp_path / "b.pkl").keys() == value.keys()
    for key in ("boxes", "names"):
        assert np.array_equal(read[key], value[key]) and read[key].dtype == value[key].dtype
    assert (read["score"], read["more"]) == (value["score"], value["more"])


def test_histories_of_losses_are_mmengines_again(tmp_path: Path) -> None:
    history = HistoryBuffer([1.0, 2.5], [1, 3])
    hub = {"log_scalars": {"loss": history}, "runtime_info": {}, "resumed_keys": {}}
    torch.save({"state_dict": {}, "message_hub": hub}, tmp_path / "a.pth")
    read = read_for_mmengine(tmp_path / "a.pth")["message_hub"]["log_scalars"]["loss"]
    assert isinstance(read, HistoryBuffer) and read.mean() == history.mean() == 3.5 / 4


def test_what_an_address_leads_to(
    bomb: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    torch.save({"state_dict": {"weight": torch.ones(2, 2)}}, tmp_path / "fine.pth")
    load = mmengine.runner.CheckpointLoader.load_checkpoint
    with loopback.serve() as server, safe_reading():
        for name in ("fine.pth", "bomb.pth"):
            server.files[name] = (tmp_path / name).read_bytes()
        assert load(f"{server.address}/plain/fine.pth")["state_dict"].keys() == {"weight"}
        with pytest.raises(UserError, match=r"bomb\.pth needs code"):
            load(f"{server.address}/plain/bomb.pth")
        with pytest.raises(UserError, match="cannot download"):
            load(f"{server.address}/plain/none.pth")
    assert not marker.exists()
