"""The recipes and configs that come along: found by name, and ``vitlinear configs``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from timm.models import is_model

from vitlinear.cli.config_file import read_config
from vitlinear.cli.configs import TASKS, config_paths, find_config, main
from vitlinear.errors import UserError
from vitlinear.train.run import make_parser

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DETECTOR = "mask-rcnn_ravlt-s_fpn_1x_coco"
EXAMPLES = {
    "classification": ("ravlt_t", ".yaml"),
    "detection": (DETECTOR, ".py"),
    "segmentation": ("upernet_ravlt-s_8xb2-160k_ade20k-512x512", ".py"),
}


@pytest.mark.parametrize("task", TASKS)
def test_found_by_name(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without its suffix; a file of that name in the working folder wins."""
    name, suffix = EXAMPLES[task]
    written = CONFIGS / task / f"{name}{suffix}"
    monkeypatch.chdir(tmp_path)
    assert find_config(name, task) == written
    assert find_config(written.name, task) == written
    assert find_config(str(written), task) == written
    Path(name).mkdir()  # such as an earlier run's
    assert find_config(name, task) == written
    Path(written.name).touch()
    assert find_config(written.name, task) == Path(written.name)
    assert find_config(name, task) == written


def test_a_path_that_leads_nowhere_is_left_to_who_reads_it(tmp_path: Path) -> None:
    for path in (tmp_path / "ravlt_t", Path("configs", "ravlt_t.yaml"), Path("mine.yaml")):
        assert find_config(str(path), "classification") == path


@pytest.mark.parametrize(
    ("name", "task", "says"),
    [
        ("ravlt_tt", "classification", "name of a recipe (did you mean ravlt_t, "),
        (
            DETECTOR.replace("ravlt", "ralvt"),
            "detection",
            f"of a detector (did you mean {DETECTOR}",
        ),
        (DETECTOR, "segmentation", f"'{DETECTOR}' is neither a file nor the name of a segmentor"),
    ],
)
def test_unknown_names(name: str, task: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        find_config(name, task)
    assert says in str(caught.value)
    assert str(caught.value).endswith(f"`vitlinear configs --task {task}` lists the names")


def test_a_checkout_without_its_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As git makes it where symbolic links are off: a file that holds the target."""
    (tmp_path / "configs").write_text("../../configs")
    monkeypatch.setattr("vitlinear.cli.configs.FOLDER", tmp_path / "configs")
    with pytest.raises(UserError, match="without its configs.* core.symlinks true"):
        find_config("ravlt_t", "classification")


def test_a_recipe_lies_over_one_of_ours(tmp_path: Path) -> None:
    """Named without a path; a file beside it wins."""
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: ravlt_t\ndrop_path: 0.3\n")
    values = read_config(mine, make_parser("test"))
    assert (values["model"], values["drop_path"]) == ("ravlt_t", 0.3)
    (tmp_path / "ravlt_t").write_text("model: mavit_t\n")
    assert read_config(mine, make_parser("test")) == {"model": "mavit_t", "drop_path": 0.3}


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    files = {
        (path.name.removesuffix(path.suffix), path.parent.name)
        for pattern in ("classification/*.yaml", "detection/*.py", "segmentation/*.py")
        for path in CONFIGS.glob(pattern)
    }
    assert {(name, task) for name, task, _ in rows} == files
    assert len(rows) == len(files) and all(is_model(model.split(".")[0]) for *_, model in rows)
    # One name means one file, whatever the task.
    assert set(Counter(name for name, *_ in rows).values()) == {1}
    main(["--task", "detection"])
    assert len(capsys.readouterr().out.splitlines()) == len(config_paths("detection"))


def test_one(capsys: pytest.CaptureFixture[str]) -> None:
    path = CONFIGS / "detection" / f"{DETECTOR}.py"
    main([DETECTOR])
    assert capsys.readouterr().out == f"{path}\n"
    main([DETECTOR, "--show"])
    assert capsys.readouterr().out == path.read_text()
    main([DETECTOR, "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert row == {"name": DETECTOR, "task": "detection", "model": "ravlt_s", "path": str(path)}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ravl_t"], "unknown config 'ravl_t' (did you mean ravlt_t, "),
        ([DETECTOR, "--task", "segmentation"], f"unknown config '{DETECTOR}'"),
        (["--show"], "--show needs the NAME of a config"),
    ],
)
def test_mistakes(arguments: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        main(arguments)
    assert says in str(caught.value)
