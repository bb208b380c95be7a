"""Common to mmdet and mmseg: registration, missing packages, how the backbone gets its weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch

from tests.convert.test_convert import released_weights
from tests.dense.openmmlab import build, packages
from tests.parallel.ranks import Ranks
from vitlinear.checkpoints.card import Card, save_weights
from vitlinear.checkpoints.read import CheckpointError
from vitlinear.create import data_config
from vitlinear.errors import Notice, UserError, pip_install

pytestmark = packages()

ROOT = Path(__file__).parents[2]


def python(code: str, *path: Path) -> tuple[int, str]:
    """Runs code in a process of its own; returns its status and all that it printed."""
    folders = [str(folder) for folder in (*path, ROOT)]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {folders!r}\n{code}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    return done.returncode, done.stdout


@pytest.mark.process
def test_nothing_of_openmmlab_is_imported_unasked(modules: dict[str, set[str]]) -> None:
    loaded = {name.split(".")[0] for name in modules["dense"]}
    assert "vitlinear" in loaded and not loaded & {"mmengine", "mmcv", "mmdet", "mmseg"}


# Forks for each call, of a process that has imported what calls share: the status is printed, all
# output goes to a file.
FORKS = """
import importlib, os, traceback
import timm, torch

def forked(folder, call):
    child = os.fork()
    if not child:
        output, status = os.open(folder + "/output", os.O_WRONLY | os.O_CREAT), 1
        for standard in (1, 2):
            os.dup2(output, standard)
        try:
            status = call()
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

CUSTOM_IMPORTS = """
import warnings
warnings.filterwarnings("ignore", category=DeprecationWarning)
from mmengine.config import Config

def build(path, scope):
    config = Config.fromfile(path)
    registry = importlib.import_module(f"{scope}.registry")
    backbone = registry.MODELS.build(config.model)
    constructors = registry.OPTIM_WRAPPER_CONSTRUCTORS
    constructors.get("vitlinear.LayerDecayOptimWrapperConstructor").__name__
    print("channels", backbone.channels)
    return 0

for scope, folder in FOLDERS.items():
    forked(folder, lambda: build(folder + "/config.py", scope))
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"vitlinear", "mmcv", "mmdet", "mmseg"}, "of these, a config imports all"
"""


@pytest.mark.process
@pytest.mark.slow
def test_custom_imports_are_enough(tmp_path: Path) -> None:
    """And mmengine has nothing to say about it."""
    folders = {}
    for scope, package in (("mmdet", "detection"), ("mmseg", "segmentation")):
        folder = tmp_path / scope
        folder.mkdir()
        folders[scope] = str(folder)
        (folder / "config.py").write_text(
            f"custom_imports = dict(imports=['vitlinear.{package}'], allow_failed_imports=False)\n"
            "model = dict(type='vitlinear.Backbone', model='test_mavit', out_norms=True)\n"
        )
    status, printed = python(FORKS + CUSTOM_IMPORTS.replace("FOLDERS", repr(folders)))
    said = {scope: (tmp_path / scope / "output").read_text() for scope in folders}
    assert (status, printed.split()) == (0, ["0", "0"]), (printed, said)
    for output in said.values():
        lines = [line for line in output.splitlines() if "import OneDL" not in line]
        assert lines == ["channels (24, 48, 64, 96)"], output


# mmengine is imported once nobody is to miss it.
BROKEN_PACKAGES = """
import vitlinear
from vitlinear_cli import main

def train(folder):
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    return main(["train-detector", "none.py"])

for folder in FOLDERS:
    forked(folder, lambda: train(folder))
    import mmengine.runner
loaded = {name.split(".")[0] for name in sys.modules} & {"mmengine", "mmcv", "mmdet", "mmseg"}
assert loaded == {"mmengine"}, loaded
"""

# Files that stand for a package, and what is said of it.
BROKEN: list[tuple[dict[str, str], str]] = [
    ({"mmengine.py": "raise ModuleNotFoundError('no', name='mmengine')"},
     "mmengine is not installed"),
    ({"mmcv/__init__.py": "", "mmcv/ops.py": "import mmcv._ext"}, "compiled operators"),
    ({"mmcv/__init__.py": "", "mmcv/ops.py": "raise ImportError('undefined\\nsymbol: x')"},
     "undefined symbol: x"),
    ({"mmdet.py": "assert False, 'MMCV==2.2.0 is used but incompatible.'"},
     "MMCV==2.2.0 is used but incompatible."),
]  # fmt: skip


@pytest.mark.process
@pytest.mark.slow
def test_packages_that_do_not_work(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(len(BROKEN))]
    for folder, (files, _) in zip(folders, BROKEN, strict=True):
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content + "\n")
    code = BROKEN_PACKAGES.replace("FOLDERS", repr([str(folder) for folder in folders]))
    status, printed = python(FORKS + code)
    assert (status, printed.split()) == (0, ["2"] * len(BROKEN)), printed
    for folder, (_, says) in zip(folders, BROKEN, strict=True):
        output = (folder / "output").read_text()
        error = output.splitlines()[-1]
        assert "Traceback" not in output, output
        assert error.startswith("error: ") and says in error and error.count("\n") == 0
        assert f"{pip_install('openmmlab')} --no-build-isolation" in error


@pytest.mark.parametrize(
    ("framework", "name"),
    [
        ("mmdet", "mask-rcnn_test-ravlt_fpn_sample"),
        ("mmseg", "upernet_test-ravlt_sample"),
    ],
)
def test_a_config_of_ours_by_its_name(framework: str, name: str) -> None:
    from vitlinear.dense.openmmlab.runner import (
        TASKS,
        ConfigArguments,
        RunArguments,
        read_run_config,
    )

    def read(config: str) -> Any:
        return read_run_config(RunArguments(ConfigArguments(config, ()), None, "none"), framework)

    by_name = read(name)
    by_path = read(str(ROOT / "configs" / TASKS[framework] / f"{name}.py"))
    assert by_name.to_dict() == by_path.to_dict()
    assert by_name.work_dir == f"work_dirs/{name}"
    with pytest.raises(UserError, match=f"'{name}x' is neither a file .*did you mean {name}"):
        read(f"{name}x")


def test_checkpoint_of_the_authors(tmp_path: Path) -> None:
    """Loaded when the detector draws its weights, not before, and not overwritten then."""
    torch.save({"model": released_weights("RAVLT_T")}, tmp_path / "RAVLT_T.pth")
    init = {"type": "Pretrained", "checkpoint": str(tmp_path / "RAVLT_T.pth")}
    config = {"type": "vitlinear.Backbone", "model": "ravlt_t", "out_norms": True}
    backbone = build({**config, "init_cfg": init}, "mmdet")
    before = backbone.model.state_dict()["stages.0.blocks.0.mlp.fc1.weight"].clone()
    backbone.init_weights()
    assert backbone.init_cfg == init
    overlay = {"file": init["checkpoint"]}
    source = timm.create_model("ravlt_t", pretrained=True, pretrained_cfg_overlay=overlay)
    expected = source.state_dict()
    assert not before.equal(expected["stages.0.blocks.0.mlp.fc1.weight"])
    for name, value in backbone.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    assert set(backbone.state_dict()) == {
        *(f"model.{name}" for name in backbone.model.state_dict()),
        *(f"norms.{index}.{part}" for index in range(4) for part in ("weight", "bias")),
    }


def test_checkpoint_of_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitlinear.dense.openmmlab import reading

    source = timm.create_model("test_ravlt")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    address = "https://example.org/weights.pth"
    fetched: list[Any] = []

    def fetch(config: Any, folder: Any) -> Path:
        fetched.append(config)
        return tmp_path / "weights.pth"

    monkeypatch.setattr(reading, "ensure_downloaded", fetch)
    config = {"type": "vitlinear.Backbone", "model": "test_ravlt"}
    init = {"type": "Pretrained", "checkpoint": address}
    backbone = build({**config, "init_cfg": init}, "mmdet")
    backbone.init_weights()
    assert fetched == [{"url": address}]
    for name, value in backbone.model.state_dict().items():
        torch.testing.assert_close(value, source.state_dict()[name], rtol=0, atol=0)
    init = {**init, "checkpoint": "torchvision://resnet50"}
    with pytest.raises(UserError, match="cannot fetch torchvision://resnet50"):
        build({**config, "init_cfg": init}, "mmdet").init_weights()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, processes share batch norms")
def test_processes_without_a_gpu_have_batch_norms_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vitlinear.dense.openmmlab import runner

    name = "cascade-mask-rcnn_ravlt-s_fpn_ms-crop-3x_coco"
    arguments = runner.RunArguments(runner.ConfigArguments(name, ()), None, "pytorch")
    config = runner.read_run_config(arguments, "mmdet")
    monkeypatch.setattr(runner.Runner, "from_cfg", lambda config: config)
    with pytest.warns(Notice, match="SyncBN is BN"):
        built: Any = runner.build_runner(config)
    assert built.sync_bn is None and "SyncBN" not in str(built.model)
    assert built.model.roi_head.bbox_head[0].norm_cfg.type == "BN"


def test_pretrained_is_kept(tmp_path: Path) -> None:
    """By a detector's init_weights too, which calls each part's."""
    from mmengine.model import BaseModule

    torch.manual_seed(0)
    source = timm.create_model("test_ravlt")
    torch.save(source.state_dict(), tmp_path / "weights.pth")

    class Parent(BaseModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = build(
                {
                    "type": "vitlinear.Backbone",
                    "model": "test_ravlt",
                    "pretrained": True,
                    "pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")},
                    "init_cfg": {"type": "Constant", "layer": "LayerNorm2d", "val": 2.0},
                },
                "mmdet",
            )

    parent = Parent()
    parent.init_weights()
    expected = source.state_dict()
    for name, value in parent.backbone.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_mistakes_in_the_backbone(tmp_path: Path) -> None:
    config = {"type": "vitlinear.Backbone", "model": "test_ravlt"}
    missing = {"type": "Pretrained", "checkpoint": str(tmp_path / "none.pth")}
    with pytest.raises(UserError, match="none.pth does not exist"):
        build({**config, "init_cfg": missing}, "mmdet").init_weights()
    with pytest.raises(UserError, match="unknown model 'ravlt_x'"):
        build({**config, "model": "ravlt_x"}, "mmdet")
    with pytest.raises(UserError, match="not both"):
        overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": __file__}}
        build({**config, **overlay, "init_cfg": missing}, "mmdet")
    torch.save({"weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="none of its weights"):
        other = {**missing, "checkpoint": str(tmp_path / "other.pth")}
        build({**config, "init_cfg": other}, "mmdet").init_weights()


def weights_with_a_card(path: Path, **kwargs: Any) -> None:
    model = timm.create_model("test_ravlt", **kwargs)
    config = data_config(model, {})
    card = Card("test_ravlt", kwargs, model.num_classes, 3, config, "RGB")
    save_weights(path, model.state_dict(), card, {})


def test_weights_of_a_model_that_was_built_otherwise(tmp_path: Path) -> None:
    """Attentions of equal shapes are told of, other shapes refused."""
    config = {"type": "vitlinear.Backbone", "model": "test_ravlt"}
    for name, kwargs in (
        ("alike", {"attn_types": ["rala"] * 4}),
        ("other", {"mlp_ratios": [2, 2, 2, 2]}),
    ):
        path = tmp_path / f"{name}.safetensors"
        weights_with_a_card(path, **kwargs)
        init = {"type": "Pretrained", "checkpoint": str(path)}
        backbone = build({**config, "init_cfg": init}, "mmdet")
        if name == "alike":
            with pytest.warns(Notice, match="attn_types=.*is built otherwise here"):
                backbone.init_weights()
        else:
            with pytest.warns(Notice), pytest.raises(CheckpointError, match="built otherwise: "):
                backbone.init_weights()


def test_weights_that_training_started_from_need_not_be_there(tmp_path: Path) -> None:
    from vitlinear.dense.openmmlab.checks import name_arguments, without_start_weights

    path = tmp_path / "start.safetensors"
    section = {"type": "vitlinear.Backbone", "model": "test_ravlt", "checkpoint_path": str(path)}
    gone = dict(section)
    with pytest.warns(Notice, match="is not there: if its card names arguments"):
        without_start_weights(gone)
    assert gone == {"type": section["type"], "model": "test_ravlt", "pretrained": False} | {
        "init_cfg": None
    }
    weights_with_a_card(path, mlp_ratios=[2, 2, 2, 2])
    there = dict(section)
    without_start_weights(there)
    assert there == gone | {"in_chans": 3, "mlp_ratios": [2, 2, 2, 2]}
    build(there, "mmdet")
    trained = dict(section)
    name_arguments(trained)  # of a run: whole once the file is gone
    path.unlink()
    with pytest.warns(Notice):
        without_start_weights(trained)
    assert trained == there


def told_of_annotations() -> str:
    """The error of this process where the first one refuses the annotations."""
    from mmengine.config import Config

    from vitlinear.dense.openmmlab import annotations

    def refuse(*args: object) -> None:
        raise UserError("no such class")

    annotations.check_annotations = refuse
    os.environ.update(RANK=str(torch.distributed.get_rank()), WORLD_SIZE="2", LOCAL_RANK="0")
    tell = annotations.check_annotations_once(Config({"launcher": "slurm"}), (), "mmdet")
    try:
        tell()
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.process
def test_annotations_are_refused_in_all_processes(tmp_path: Path) -> None:
    ranks = Ranks(2, str(tmp_path / "store"))
    try:
        told = ranks.run(told_of_annotations)
    finally:
        ranks.close()
    assert told == ["UserError: no such class", "LostPeerError: process 0 failed: no such class"]


@pytest.mark.parametrize("bare", [True, False])
def test_evaluation_loads_bare_weights_too(bare: bool, tmp_path: Path) -> None:
    from vitlinear.dense.openmmlab.runner import EvaluationRunner

    trained, model = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    weights = trained.state_dict()
    torch.save(weights if bare else {"state_dict": weights}, tmp_path / "weights.pth")
    runner: Any = SimpleNamespace(model=model, call_hook=lambda *args, **kwargs: None)
    EvaluationRunner.load_checkpoint(runner, str(tmp_path / "weights.pth"))
    assert torch.equal(model.weight, trained.weight)
