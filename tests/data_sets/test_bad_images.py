"""Unreadable images: errors that name them, or left out, recorded and listed."""

import io
import json
import os
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features

from tests.train.helpers import image_folder, tiny_flags, train, two_processes
from vitlinear.checkpoints.load import read_weights
from vitlinear.data import dataset as data
from vitlinear.data import images
from vitlinear.data.bad_images import LIMIT, UNREADABLE, BadImages
from vitlinear.data.labelled import LabelledImages
from vitlinear.errors import UserError
from vitlinear.evaluation import validate
from vitlinear.evaluation.evaluate import Evaluator, PerClass
from vitlinear_cli import main


def bomb() -> bytes:
    """A small PNG that says that it is 30,000 x 30,000."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda raw: raw[: len(raw) // 2], "truncated"),
    "empty": (lambda raw: b"", "the file is empty"),
    "not an image": (lambda raw: b"hello", "not an image"),
    "bomb": (lambda raw: bomb(), "decompression bomb"),
}


def damage(path: Path, how: str) -> None:
    path.write_bytes(DAMAGES[how][0](path.read_bytes()))


def damaged_folder(root: Path, held_out: bool = True) -> Path:
    """Four damaged training images and one that is gone, one held out; the last one included."""
    image_folder(root)
    places = ("ant/0", "ant/1", "bee/3", "cat/7")
    for how, place in zip(DAMAGES, places, strict=True):
        damage(root / "train" / f"{place}.png", how)
    gone = root / "train" / "bee" / "5.png"
    gone.unlink()
    gone.symlink_to(root / "nowhere.png")
    if held_out:
        damage(root / "val" / "cat" / "1.png", "truncated")
    return root


LISTED = ("train/ant/0.png", "train/ant/1.png", "train/bee/3.png", "train/bee/5.png")
LISTED += ("train/cat/7.png", "val/cat/1.png")


def listed(path: Path, root: Path) -> dict[str, str]:
    lines = (path / "bad_images.txt").read_text().splitlines()
    pairs = (line.split("\t") for line in lines)
    return {str(Path(name).relative_to(root)): why for name, why in pairs}


@pytest.mark.parametrize(
    ("how", "workers"),
    [
        *((how, 0) for how in DAMAGES),
        pytest.param("truncated", 1, marks=pytest.mark.process),
    ],
)
def test_error_names_file_and_reason(
    how: str, workers: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = image_folder(tmp_path / "images")
    damage(root / "train" / "bee" / "3.png", how)
    flags = tiny_flags(root, tmp_path / "run", "-j", workers)
    assert main(["train", *flags]) == 2
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: cannot read image ") and "bee/3.png: " in message
    assert DAMAGES[how][1] in message and "replace or remove it, or --bad-images skip" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(13, "Permission denied", "/x"), "permission denied"),
        (Image.UnidentifiedImageError("cannot identify <_io.BytesIO at 0x7f>"), "not an image"),
        (ValueError("two\nlines"), "two lines"),
    ],
)
def test_reasons(error: Exception, reason: str) -> None:
    assert images.reason(error) == reason


def test_no_damage_escapes() -> None:
    """Whatever bytes change, an image is read or is unreadable; nothing else is raised."""
    draw = random.Random(0)
    source = Image.fromarray(np.random.RandomState(0).randint(0, 256, (24, 24, 3), np.uint8))
    unreadable = 0
    kinds = ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "DDS", "BLP"]
    kinds += ["AVIF"] if features.check("avif") else []
    for kind in kinds:
        file = io.BytesIO()
        (source.quantize() if kind == "BLP" else source).save(file, kind)
        for _ in range(150):
            raw = bytearray(file.getvalue())
            for _ in range(draw.randint(1, 8)):
                raw[draw.randrange(min(len(raw), 400))] = draw.randrange(256)
            if draw.random() < 0.3:
                del raw[draw.randrange(len(raw)) :]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    images.pixels(bytes(raw), "RGB")
                except images.DAMAGE:
                    unreadable += 1
    assert 100 < unreadable < 150 * len(kinds)


def test_sixteen_bit_images_keep_their_upper_byte(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for suffix in ("png", "tif"):
        Image.fromarray(values).save(tmp_path / f"grey.{suffix}")
        content = (tmp_path / f"grey.{suffix}").read_bytes()
        assert np.array_equal(np.asarray(images.pixels(content, "L")), values >> 8)
        assert np.array_equal(np.asarray(images.pixels(content, "RGB"))[..., 1], values >> 8)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.process)])
def test_skipped_images_are_replaced_counted_and_listed(
    workers: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = damaged_folder(tmp_path / "images")
    flags = ("--bad-images", "skip", "-j", workers)
    train(root, tmp_path / "whole", *flags)
    found = listed(tmp_path / "whole", root)
    assert tuple(found) == LISTED
    assert found["train/bee/5.png"] == "no such file or directory"
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").open()]
    assert [row["bad_images"] for row in rows] == [6, 6]
    assert ", 6 unreadable images left out, " in capfd.readouterr().out

    train(root, tmp_path / "resumed", *flags, "--stop-epoch", 1)
    (tmp_path / "resumed/bad_images.txt").write_text(" of an earlier part\tempty\n")
    train(root, tmp_path / "resumed", *flags, "--resume", "auto")
    text = (tmp_path / "resumed/bad_images.txt").read_text()
    assert text == " of an earlier part\tempty\n" + (tmp_path / "whole/bad_images.txt").read_text()
    whole, resumed = (
        read_weights(tmp_path / name / "last.safetensors") for name in ("whole", "resumed")
    )
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_replacement_is_the_next_image(tmp_path: Path) -> None:
    root = damaged_folder(tmp_path / "images")
    record = BadImages(skip=True)
    dataset = data.open_dataset(None, train=True, mode="RGB", data_dir=str(root), bad_images=record)
    assert len(dataset) == 24
    for index, other in ((0, 2), (1, 2), (11, 12), (13, 14), (23, 2)):
        image, label = dataset[index]
        expected, its_label = dataset[other]
        assert image.tobytes() == expected.tobytes() and label == its_label
    assert len(record.collect()) == 5


def test_a_share_that_is_gone_is_no_damaged_file(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", train=LIMIT)
    dataset = data.open_dataset(
        None, train=True, mode="L", data_dir=str(root), bad_images=BadImages(skip=True)
    )
    for path in (root / "train" / "ant").iterdir():
        path.unlink()
    assert dataset[1][1] == 1  # over nine to the next
    with pytest.raises(UserError, match="10 images in a row cannot be read, .*is the disk"):
        dataset[0]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.process)])
def test_a_share_that_is_gone_ends_the_evaluation_too(workers: int, tmp_path: Path) -> None:
    from torch.utils.data import DataLoader

    root = image_folder(tmp_path / "images", val=LIMIT)
    dataset = data.open_dataset(
        None, train=False, mode="L", data_dir=str(root), bad_images=BadImages(skip=True)
    )
    dataset.transform = lambda image: torch.zeros(1)
    for number, path in enumerate(sorted((root / "val" / "ant").iterdir())):
        path.unlink()
        loader = DataLoader(dataset, 4, num_workers=workers)
        if number < LIMIT - 1:  # nine, then others: again, and the next time too
            assert len(list(loader)) == 8
            continue
        with pytest.raises(UserError, match="10 images in a row cannot be read, .*is the disk"):
            list(loader)


@pytest.mark.process
def test_held_out_images_are_left_out_of_the_metric(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = image_folder(tmp_path / "images")
    train(root, tmp_path / "run")
    weights = str(tmp_path / "run" / "best.safetensors")
    flags = ["--checkpoint", weights, "--data-dir", str(root), "-j", "2", "-b", "4"]

    def measured(*more: str) -> dict[str, Any]:
        return validate.validate(validate.parse_arguments([*flags, *more]))

    damage(root / "val" / "bee" / "1.png", "truncated")
    with pytest.raises(UserError, match="cannot read image .*val/bee/1.png"):
        measured("-j", "0")
    skipped = measured("--bad-images", "skip", "--per-class")
    assert [Path(name).name for name in skipped["unreadable"]] == ["1.png"]
    assert main(["validate", *flags, "--bad-images", "skip"]) == 0
    out = capfd.readouterr().out
    assert " on 8 images" in out and "left out: " in out and "bee/1.png: " in out
    (root / "val" / "bee" / "1.png").unlink()
    without = measured("--per-class")
    for key in ("images", "top1", "per_class"):
        assert skipped[key] == without[key]
    assert skipped["loss"] == pytest.approx(without["loss"], abs=1e-6)
    for path in (root / "val").glob("*/*.png"):
        damage(path, "empty")
    with pytest.raises(UserError, match="none of 8 held-out images could be read"):
        measured("--bad-images", "skip")


def test_evaluator_counts_padding_before_it_drops_unreadable_images() -> None:
    """The first three of four places are real; the second could not be read."""
    logits = torch.eye(3)[[0, 0, 2, 1]] * 9
    target = torch.tensor([0, UNREADABLE, 1, 1])
    for evaluator in (Evaluator(max_samples=3), PerClass(3)):
        evaluator.update(logits[:2], target[:2])
        evaluator.update(logits[2:], target[2:])
        seen = 2 if evaluator.left is not None else 3
        assert (evaluator.num_samples, evaluator.unreadable) == (seen, 1)
        assert evaluator.compute()["top1"] == pytest.approx(100 * (seen - 1) / seen)


@pytest.mark.process
def test_journal_holds_lines_of_many_processes_whole(tmp_path: Path) -> None:
    """Processes that append at the same time, long and odd names included."""
    record = BadImages(skip=True)
    names = [
        [f"/data/{'x' * 3000}/{child}/{number}\t\n.png" for number in range(200)]
        for child in range(4)
    ]
    children = []
    for mine in names:
        child = os.fork()
        if child == 0:
            for name in mine:
                record.add(images.UnreadableImage(name, ValueError("broken")))
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    found = record.collect()
    assert set(found) == {images.printable(name) for mine in names for name in mine}
    assert set(found.values()) == {"broken"}
    journal = record.journal
    assert journal.exists()
    del record
    assert not journal.exists()


def test_labels_that_cannot_be_are_named(tmp_path: Path) -> None:
    class Labels:
        classes = None

        def __init__(self, label: int) -> None:
            self.label = label

        def __len__(self) -> int:
            return 1

        def read(self, index: int) -> tuple[Image.Image, int]:
            return Image.new("L", (4, 4)), self.label

        def name(self, index: int) -> str:
            return "a.png"

    with pytest.raises(UserError, match=r"a.png has no label \(it says -1\)"):
        LabelledImages(Labels(-1), "L")[0]
    with pytest.raises(UserError, match="a.png has the label 3, but there are only 3 classes"):
        LabelledImages(Labels(3), "L", num_classes=3)[0]
    assert LabelledImages(Labels(3), "L")[0][1] == 3


@pytest.mark.process
@pytest.mark.slow
def test_two_processes_list_together(tmp_path: Path) -> None:
    root = damaged_folder(tmp_path / "images")
    flags = ("--bad-images", "skip", "-j", 1, "-b", 4)
    two_processes(*tiny_flags(root, tmp_path / "run", *flags))
    assert tuple(listed(tmp_path / "run", root)) == LISTED
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [row["bad_images"] for row in rows] == [6, 6]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.process)])
def test_shards_leave_out_unreadable_images(workers: int, tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="pip install 'vitlinear[data]'")
    from torch.utils.data import DataLoader

    from tests.data_sets.shards import write_shards

    root = damaged_folder(tmp_path / "images")
    (root / "train/bee/5.png").unlink()
    (root / "train/bee/5.png").write_bytes(b"")
    shards = write_shards(root, tmp_path / "shards")
    record = BadImages(skip=True)

    def labels(train: bool) -> list[int]:
        dataset = data.open_dataset(
            "wds/", train=train, mode="L", data_dir=str(shards), batch_size=4, bad_images=record
        )
        dataset.set_loader_cfg(num_workers=workers)
        dataset.transform = lambda image: torch.from_numpy(np.asarray(image).copy()).float().mean()
        return [
            int(label)
            for _, batch in DataLoader(dataset, 4, num_workers=workers)
            for label in batch
        ]

    assert len(labels(True)) == 24 and UNREADABLE not in labels(True)
    held_out = labels(False)
    assert sorted(held_out) == [UNREADABLE, 0, 0, 0, 1, 1, 1, 2, 2]
    names = [name.rpartition(" ")[2] for name in record.collect()]
    assert sorted(names) == sorted(
        ("ant_0.png", "ant_1.png", "bee_3.png", "bee_5.png", "cat_7.png", "cat_1.png")
    )
    with pytest.raises(Exception, match="cannot read image .*--bad-images skip"):
        record = BadImages()
        labels(True)
