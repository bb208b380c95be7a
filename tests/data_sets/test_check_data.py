"""The check-data command, against a data set whose faults are known."""

import json
import runpy
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from tests.data_sets.shards import write_shards
from tests.train.helpers import CLASSES, image_folder
from vitlinear.data import check_data
from vitlinear.errors import UserError
from vitlinear_cli import main


def check(*flags: object) -> dict[str, Any]:
    return check_data.check_data(check_data.parse_arguments([str(flag) for flag in flags]))


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """Eight training images of each of three classes, three held out, and faults of each kind."""
    root = image_folder(tmp_path / "images")
    ant, bee, cat = (root / "train" / name for name in CLASSES)
    pixels = np.random.RandomState(1).randint(0, 256, (64, 64, 3)).astype(np.uint8)
    (ant / "0.png").write_bytes(b"")
    (ant / "1.png").write_bytes((ant / "1.png").read_bytes()[:900])
    Image.fromarray(pixels).convert("CMYK").save(bee / "cmyk.jpg")
    Image.fromarray((pixels[..., 0].astype(np.uint16)) << 8).save(bee / "deep.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels).save(bee / "rotated.jpg", exif=exif)
    Image.fromarray(pixels[:4, :5]).save(cat / "tiny.png")
    Image.fromarray(pixels[:12]).save(cat / "long.png")
    (cat / "again.png").write_bytes((cat / "0.png").read_bytes())
    (bee / "wrong.png").write_bytes((cat / "0.png").read_bytes())
    (root / "val" / "ant" / "leak.png").write_bytes((ant / "5.png").read_bytes())
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_every_fault_is_found(faulty: Path, workers: int) -> None:
    report = check("--data-dir", faulty, "-j", workers)
    train, held_out = report["splits"]["training"], report["splits"]["held-out"]

    def short(name: str) -> str:
        return str(Path(name).relative_to(faulty))

    assert {short(entry["name"]): entry["reason"] for entry in train["unreadable"]} == {
        "train/ant/0.png": "the file is empty",
        "train/ant/1.png": "image file is truncated",
    }
    assert (train["images"], held_out["images"]) == (31, 10)
    assert {kind: [short(name) for name in names] for kind, names in train["odd"].items()} == {
        "cmyk": ["train/bee/cmyk.jpg"],
        "deep": ["train/bee/deep.png"],
        "rotated": ["train/bee/rotated.jpg"],
        "tiny": ["train/cat/tiny.png"],
        "elongated": ["train/cat/long.png"],
    }
    assert train["class_counts"] == {
        "min": 8, "median": 11.0, "max": 12, "empty": 0, "imbalance": 1.5,
    }  # fmt: skip
    assert train["classes"] == [
        {"class": name, "images": number} for name, number in zip(CLASSES, (8, 12, 11), strict=True)
    ]
    assert train["width"] == {"min": 5, "p5": 32, "median": 32, "p95": 64, "max": 64}
    assert train["height"]["min"] == 4
    assert train["file_bytes"]["max"] == max(
        path.stat().st_size for path in (faulty / "train").glob("*/*")
    )
    assert train["modes"] == {"RGB": 27, "CMYK": 1, "I;16": 1}
    assert train["formats"] == {"PNG": 27, "JPEG": 2}
    assert (train["repeated"], train["ambiguous"]) == (2, 1)
    assert [[short(name) for name in pair] for pair in report["in_both"]] == [
        ["val/ant/leak.png", "train/ant/5.png"]
    ]
    assert not held_out["unreadable"] and not held_out["odd"]
    assert report["classes_differ"] == report["classes_in_one_split"] == []


def test_command_prints_writes_and_exits(
    faulty: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["check-data", "--data-dir", str(faulty), "-j", "0"]
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--json", str(tmp_path / "report.json")])
    assert stop.value.code == 1
    out = capfd.readouterr().out
    for line in (
        "training: 31 images, 2 unreadable",
        f"    {faulty}/train/ant/0.png: the file is empty",
        "  3 classes; images per class: min 8, median 11, max 12, largest / smallest 1.5",
        "  width: min 5, p5 32, median 32, p95 64, max 64",
        "  modes: RGB 27, CMYK 1, I;16 1",
        "  1 CMYK or another mode of print",
        "  2 repeat the content of another",
        "  1 contents are in several classes",
        "held-out: 10 images, 0 unreadable",
        "1 held-out images are also in the training split",
        f"    {faulty}/val/ant/leak.png = {faulty}/train/ant/5.png",
    ):
        assert line in out.splitlines()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == check("--data-dir", faulty, "-j", 0)
    for name in ("0.png", "1.png"):
        (faulty / "train" / "ant" / name).unlink()
    assert main(flags) == 0


def test_tool_is_the_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = Path(__file__).parents[2] / "tools" / "check_data.py"
    monkeypatch.setattr(sys, "argv", [tool.name, "--data-dir", str(folder), "-j", "0"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(tool), run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("training: 24 images, 0 unreadable")


def test_classes_of_one_split_only(folder: Path, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    (root / "val" / "cat").rename(root / "val" / "dog")
    assert check("--data-dir", root, "-j", 0)["classes_differ"] == ["cat", "dog"]
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\neel\n")
    report = check("--data-dir", folder, "--class-map", names, "-j", 0)
    assert report["splits"]["training"]["class_counts"]["empty"] == 1
    assert "; 1 empty: eel" in "\n".join(check_data._text(report))


def test_a_tar_alone_is_one_split(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.add(folder / "val", arcname=".")
    report = check("--data-dir", tmp_path / "val.tar", "-j", 2)
    assert list(report["splits"]) == ["held-out"]
    assert report["splits"]["held-out"]["images"] == 9


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_read_once(folder: Path, tmp_path: Path, workers: int) -> None:
    pytest.importorskip("webdataset", reason="pip install 'vitlinear[data]'")
    root = write_shards(folder, tmp_path / "shards")
    flags = ("--dataset", "wds/", "--data-dir", root, "-j", workers)
    loose = check("--data-dir", folder, "-j", 0)
    packed = check(*flags)
    for name, split in packed["splits"].items():
        for key in ("images", "class_counts", "width", "file_bytes", "modes", "repeated"):
            assert split[key] == loose["splits"][name][key]
    (root / "train-0001.tar").write_bytes((root / "train-0001.tar").read_bytes()[:9000])
    damaged = check(*flags, "--num-classes", 2)["splits"]["training"]
    wrong = {entry["reason"] for entry in damaged["unreadable"] if "label" in entry["reason"]}
    assert wrong == {"the label 2 is none of 2 classes"}
    (shard,) = [entry for entry in damaged["unreadable"] if entry["name"].endswith(".tar")]
    assert "train-0001.tar" in shard["name"] and "fetch it again" in shard["reason"]
    assert 12 < damaged["images"] < 24


def test_hugging_face_data(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="pip install 'vitlinear[data]'")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf-cache"))
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    report = check("--dataset", f"hfds/{folder}", "-j", 0)
    loose = check("--data-dir", folder, "-j", 0)
    assert report == loose
    streamed = check("--dataset", f"hfids/{folder}", "-j", 0)
    assert streamed["splits"]["training"]["classes"] == [
        {"class": str(label), "images": 8} for label in range(3)
    ]


def test_mistakes_come_before_reading(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        check("--data-dir", tmp_path / "nowhere")
    with pytest.raises(UserError, match="no data: give --dataset"):
        check()
    image_folder(tmp_path / "images", val=0)
    with pytest.raises(UserError, match="holds no images"):
        check("--data-dir", tmp_path / "images")
    image_folder(tmp_path / "whole")
    image = min((tmp_path / "whole").rglob("*.png"))
    with pytest.raises(UserError, match="the command reads it; give another name"):
        check("--data-dir", tmp_path / "whole", "--json", image)
