"""Which files are images, and of which class: loose and in tars, the same for every command."""

import errno
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.commands import Command
from tests.train.helpers import CLASSES, image_folder, tiny_flags
from vitlinear.data import dataset as data
from vitlinear.data import listing
from vitlinear.data.class_names import class_list, classes_of
from vitlinear.errors import UserError


def packed(folder: Path, root: Path, above: str = ".") -> Path:
    """Packs both splits of a folder data set into tars."""
    root.mkdir()
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            tar.add(folder / split, arcname=above.format(split=split))
    return root


def opened(root: Path, **options: Any) -> Any:
    return data.open_dataset(None, train=True, mode="RGB", data_dir=str(root), **options)


def per_class(dataset: Any) -> dict[str, int]:
    labels = Counter(label for _, label in dataset)
    return {name: labels[index] for index, name in enumerate(classes_of(dataset) or ())}


def into(folder: Path, *names: str) -> None:
    """Moves the images of each class into sub-folders, in turn."""
    for place in folder.glob("*/*"):
        for number, file in enumerate(sorted(place.iterdir())):
            below = place / names[number % len(names)]
            below.mkdir(exist_ok=True, parents=True)
            file.rename(below / file.name)


SUB_FOLDERS: dict[str, Callable[[Path], None]] = {
    "images": lambda root: into(root, "images"),
    "parts": lambda root: into(root, "p1", "p2"),
    "deep": lambda root: into(root, "a/b", "a/c", "train"),
}


@pytest.mark.parametrize("how", SUB_FOLDERS)
@pytest.mark.parametrize("tar", [False, True])
def test_the_folder_below_the_split_is_the_class(how: str, tar: bool, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    SUB_FOLDERS[how](root)
    if tar:
        root = packed(root, tmp_path / "tars")
    train = opened(root)
    assert classes_of(train) == list(CLASSES) and per_class(train) == dict.fromkeys(CLASSES, 8)
    hues = [
        max(range(3), key=image.resize((1, 1)).getpixel((0, 0)).__getitem__) for image, _ in train
    ]
    assert hues == [label for _, label in train]
    assert not train.notes


@pytest.mark.parametrize("tar", [False, True])
def test_one_class_is_one_class_and_told(tar: bool, tmp_path: Path, command: Command) -> None:
    root = image_folder(tmp_path / "images")
    for split in ("train", "val"):
        for name in ("bee", "cat"):
            shutil.rmtree(root / split / name)
    into(root, "p1", "p2")
    if tar:
        root = packed(root, tmp_path / "tars")
    assert classes_of(opened(root)) == ["ant"]
    result = command("train", *tiny_flags(root, tmp_path / "run", "--epochs", 1))
    assert result.code == 0, result.err
    assert "warning: all training images are of one class" in result.out
    checked = command("check-data", "--data-dir", root, "-j", 0)
    assert checked.code == 0 and "warning: all training images are of one class" in checked.out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ant\nbee\ncat\n\n \n", None),
        ("ant\nbee\nant\ncat\n", "classes.txt names ant twice"),
        ("ant\n\nbee\ncat\n", "classes.txt has an empty line 2"),
    ],
)
def test_lines_of_a_class_map(text: str, message: str | None, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text(text)
    names = str(tmp_path / "classes.txt")
    if message is None:
        assert opened(folder, class_map=names).classes == ["ant", "bee", "cat"]
        return
    with pytest.raises(UserError, match=message):
        opened(folder, class_map=names)
    with pytest.raises(UserError, match=message):  # of data whose labels are numbers
        class_list(names)


def test_one_class_of_several_is_told(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    train, held_out = (
        data.open_dataset(None, train=split, mode="L", data_dir=str(root), class_map=str(names))
        for split in (True, False)
    )
    assert (len(train), classes_of(train)) == (8, ["cat", "dog"])
    left_out = "left out 16 of classes that --class-map does not name"
    assert train.notes == [f"{root / 'train'}: {left_out}"]
    assert data.data_notes(train, held_out, 2)[-1] == data.ONE_CLASS
    names.write_text("dog\n")
    with pytest.raises(UserError, match="names no class of .*train, such as ant, bee, cat"):
        opened(root, class_map=str(names))


@pytest.mark.parametrize("above", ["train", "data/{split}", "./{split}", "/{split}"])
def test_folders_above_the_classes_of_a_tar(above: str, folder: Path, tmp_path: Path) -> None:
    train = opened(packed(folder, tmp_path / "tars", above))
    assert per_class(train) == dict.fromkeys(CLASSES, 8)


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_a_tar_of_tars(folder: Path, tmp_path: Path) -> None:
    """ImageNet's own: the tar of each class lies in one tar."""
    classes = {}
    for name in CLASSES:
        files = sorted((folder / "train" / name).iterdir())
        inner = tar_of(tmp_path / f"{name}.tar", {file.name: file.read_bytes() for file in files})
        classes[inner.name] = inner.read_bytes()
    (tmp_path / "data").mkdir()
    tar_of(tmp_path / "data" / "train.tar", classes)
    train, loose = opened(tmp_path / "data"), opened(folder)
    assert classes_of(train) == list(CLASSES) and len(train) == 24
    for index in (0, 9, 23):
        assert train[index][0].tobytes() == loose[index][0].tobytes()
        assert train[index][1] == loose[index][1]


@pytest.mark.parametrize("name", ["../../x/3.png", "ant/../../x/3.png", "/../x/3.png"])
def test_tar_members_that_climb_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    content = (folder / "train/ant/0.png").read_bytes()
    tar_of(tmp_path / "train.tar", {"ant/0.png": content, name: content})
    with pytest.raises(UserError, match="refusing .*train.tar: .*x/3.png leads out of it"):
        opened(tmp_path)
    inside = tar_of(tmp_path / "inner.tar", {name: content}).read_bytes()
    tar_of(tmp_path / "train.tar", {"ant.tar": inside, "bee/0.png": content})
    with pytest.raises(UserError, match="leads out of it"):
        opened(tmp_path)


def test_links_and_damage_in_tars(folder: Path, tmp_path: Path) -> None:
    source = image_folder(tmp_path / "images")
    first = source / "train/ant/0.png"
    os.link(first, source / "train/ant/again.png")
    (source / "train/bee/link.png").symlink_to("0.png")
    root = packed(source, tmp_path / "tars")
    train = opened(root)
    assert per_class(train) == {"ant": 9, "bee": 8, "cat": 8}
    names = [train.source.name(index) for index in range(9)]
    again = next(index for index, name in enumerate(names) if name.endswith("ant/again.png"))
    assert train[again][0].tobytes() == train[0][0].tobytes()
    assert train.notes == [f"{root / 'train.tar'}: left out 1 linked or sparse"]
    path = root / "train.tar"
    raw = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        place = tar.getmembers()[9].offset
    raw[place] ^= 0xFF  # a header, which Python's tarfile takes for the end
    path.write_bytes(raw)
    with pytest.raises(UserError, match=f"cannot open .*train.tar: damaged at byte {place}"):
        opened(root)


def test_a_tar_that_shrinks_is_unreadable(folder: Path, tmp_path: Path) -> None:
    root = packed(folder, tmp_path / "tars")
    train = opened(root)
    (root / "train.tar").write_bytes((root / "train.tar").read_bytes()[:2000])
    with pytest.raises(UserError, match="cannot read image .*train.tar: cat/7.png: .*shorter"):
        train[23]


SUFFIXES = (".tif", ".TIFF", ".webp", ".bmp", ".gif", ".JFIF", ".ppm", ".jp2", ".PNG")
if ".avif" in listing.image_suffixes():  # since Pillow 11.3
    SUFFIXES += (".Avif",)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Images of every kind of name in ant, and what is none."""
    root = image_folder(tmp_path / "mixed")
    for split in ("train", "val"):
        ant = root / split / "ant"
        with Image.open(ant / "0.png") as image:
            for number, suffix in enumerate(SUFFIXES):
                image.save(ant / f"n{number}{suffix}")
        content = (ant / "0.png").read_bytes()
        for place in (ant, root / split):
            (place / ".ipynb_checkpoints").mkdir()
            (place / ".ipynb_checkpoints" / "0.png").write_bytes(content)
        (ant / "._0.png").write_bytes(b"\0" * 9)
        (ant / ".hidden.png").write_bytes(content)
        (ant / "photo.heic").write_bytes(content)
        (ant / "notes").touch()
        (ant / "x.jpg").mkdir()
        (root / split / "README.txt").touch()
        (root / split / "stray.png").write_bytes(content)
    return root


def test_every_suffix_that_pillow_reads_and_nothing_hidden(mixed: Path, tmp_path: Path) -> None:
    for root in (mixed, packed(mixed, tmp_path / "tars")):
        train = opened(root)
        assert per_class(train) == {"ant": 8 + len(SUFFIXES), "bee": 8, "cat": 8}
        (note,) = train.notes
        where, _, parts = note.partition(": left out ")
        assert Path(where).stem == "train"
        found = dict(reversed(part.split(" ", 1)) for part in parts.split(", "))
        # in a tar, hidden are the images; among files, folders count as one
        hidden = {"hidden": "4"}
        rest = {".heic": "1", "without suffix": "1", ".txt": "1", "in no class folder": "1"}
        assert found == hidden | rest


def test_all_commands_read_the_same_images(
    mixed: Path, checkpoint: Path, command: Command, tmp_path: Path
) -> None:
    weights = ("--checkpoint", checkpoint)
    one = mixed / "val" / "ant"
    predicted = command("predict", one, *weights, "--json")
    assert predicted.code == 0, predicted.err
    assert f"{one}: left out 3 hidden, 1 .heic, 1 without suffix" in predicted.err
    names = [Path(item["file"]).name for item in json.loads(predicted.out)]
    source = opened(mixed, split="val").source
    files = [Path(source.name(index)) for index in range(len(source))]
    assert names == [file.name for file in files if file.parent.name == "ant"]
    assert len(names) == 3 + len(SUFFIXES)
    checked = command("check-data", "--data-dir", mixed, "-j", 0, "--json", tmp_path / "r.json")
    assert checked.code == 0, checked.err
    report = json.loads((tmp_path / "r.json").read_text())["splits"]
    counts = [report[name]["images"] for name in ("training", "held-out")]
    assert counts == [24 + len(SUFFIXES), 9 + len(SUFFIXES)]
    assert report["training"]["left_out"][".heic"] == 1
    assert "  left out 4 hidden, " in checked.out
    measured = command("validate", *weights, "--data-dir", mixed, "-j", 0)
    assert measured.code == 0 and f" on {counts[1]} images" in measured.out
    assert f"{mixed / 'val'}: left out 4 hidden, " in measured.err
    trained = command("train", *tiny_flags(mixed, tmp_path / "run", "--epochs", 1))
    assert trained.code == 0, trained.err
    assert f"{counts[0]} training and {counts[1]} held-out images" in trained.out
    assert f"{mixed / 'train'}: left out 4 hidden, " in trained.out


def test_links_are_followed_once(folder: Path, tmp_path: Path) -> None:
    """A class folder elsewhere, a link upwards, one sideways, one to itself: each image once."""
    root = image_folder(tmp_path / "images")
    shutil.move(root / "train" / "cat", tmp_path / "elsewhere")
    (root / "train" / "cat").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "ant" / "up").symlink_to(root / "train")
    (root / "train" / "ant" / "0_bee").symlink_to(root / "train" / "bee")
    (root / "train" / "bee" / "self").symlink_to("self")
    into(tmp_path / "none", "x")
    train = opened(root)
    assert per_class(train) == dict.fromkeys(CLASSES, 8)
    assert train.notes == [f"{root / 'train'}: left out 2 linked once more, 1 without suffix"]
    found = listing.find_images([str(root / "train")])
    assert len(found) == len({os.path.realpath(file) for file in found}) == 24
    (root / "train" / "kitten").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="class folders .*cat and .*kitten are one and the same"):
        opened(root)


def test_no_file_that_would_block_or_is_none(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    os.mkfifo(root / "train" / "ant" / "pipe.png")
    train = opened(root)
    assert len(train) == 24 and train.notes == [f"{root / 'train'}: left out 1 special"]


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = image_folder(tmp_path / "images")
    scan = os.scandir

    def refuse(path: Any = ".") -> Any:
        if str(path).endswith("bee"):  # permissions would not stop root
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="cannot read folder .*train/bee: Permission denied"):
        opened(root)


def test_names_of_any_bytes(
    images: Path, checkpoint: Path, command: Command, tmp_path: Path
) -> None:
    content = (images / "val/ant/0.png").read_bytes()
    names = (b"caf\xe9.png", b"two\nlines.png", b"1\xc2\xb21.png", b"tab\t.png")
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(content)
    result = command("predict", tmp_path, "--checkpoint", checkpoint, "--topk", 1)
    assert result.code == 0, result.err
    shown = [line.rpartition(": ")[0] for line in result.out.splitlines()]
    assert {name.removeprefix(f"{tmp_path}/") for name in shown} == {
        r"caf\udce9.png", r"two\nlines.png", "1²1.png", r"tab\t.png",
    }  # fmt: skip
    listed = json.loads(command("predict", tmp_path, "--checkpoint", checkpoint, "--json").out)
    assert {os.fsencode(os.path.basename(item["file"])) for item in listed} == set(names)


@pytest.mark.parametrize("tar", [False, True])
def test_class_names_are_text(tar: bool, tmp_path: Path, command: Command) -> None:
    root = image_folder(tmp_path / "images")
    for split in ("train", "val"):
        place = os.fsencode(root / split)
        os.rename(os.path.join(place, b"bee"), os.path.join(place, b"b\xe9e\n"))
    if tar:
        root = packed(root, tmp_path / "tars")
    assert classes_of(opened(root)) == ["ant", r"b\udce9e\n", "cat"]
    result = command("train", *tiny_flags(root, tmp_path / "run", "--epochs", 1))
    assert result.code == 0, result.err


@pytest.mark.quick("data")
def test_order_is_natural_and_has_no_ties() -> None:
    names = ["a10", "a2", "A2", "b", "a", "1²1", "1", "10", "2"]
    for start in (names, names[::-1]):
        assert sorted(start, key=listing.natural_order) == [
            "1", "1²1", "2", "10", "a", "A2", "a2", "a10", "b",
        ]  # fmt: skip


def test_a_folder_of_other_files_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.heic").touch()
    (tmp_path / ".b.png").touch()
    message = r"holds no images \(.*\.png.*\) \(left out 1 \.heic, 1 hidden\): give another"
    with pytest.raises(UserError, match=message):
        listing.find_images([str(tmp_path)])
    assert listing.find_images([str(tmp_path / "a.heic")])  # as named
