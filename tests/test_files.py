"""Files for results: whole, where they were asked for, new, and in no input's place."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from tests.commands import Command
from vitlinear.errors import UserError
from vitlinear.files import (
    ResultPaths,
    check_apart,
    check_no_input_folder,
    check_parent,
    check_results,
    write_atomically,
    write_text,
)

MANY = [".png", "_labels.png"]


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_each_input_has_paths_of_its_own(tmp_path: Path) -> None:
    paths = ResultPaths([])
    found = [names(paths.take(tmp_path, stem, [".png"])) for stem in ("cat", "cat", "cat-2")]
    assert found == [["cat.png"], ["cat-2.png"], ["cat-2-2.png"]]
    other = tmp_path / "other"
    assert paths.take(other, "cat", [".png"]) == [other / "cat.png"]
    # several files for an input, all under one name that is free for all of them
    paths = ResultPaths([])
    assert names(paths.take(tmp_path, "cat", MANY)) == ["cat.png", "cat_labels.png"]
    second = names(paths.take(tmp_path, "cat_labels", MANY))
    assert second == ["cat_labels-2.png", "cat_labels-2_labels.png"]
    assert names(paths.take(tmp_path, "Cat", MANY)) == ["Cat-2.png", "Cat-2_labels.png"]
    assert names(paths.take(tmp_path, "v1.2", MANY)) == ["v1.2.png", "v1.2_labels.png"]


def test_no_input_and_no_file_that_was_there(tmp_path: Path) -> None:
    image, old, link = (tmp_path / name for name in ("a.png", "b.png", "c.png"))
    image.touch()
    old.touch()
    link.symlink_to(image)
    for overwrite, of_b in ((False, "b-2.png"), (True, "b.png")):
        paths = ResultPaths([image], overwrite)
        found = [names(paths.take(tmp_path, stem, [".png"])) for stem in "abc"]
        assert found == [["a-2.png"], [of_b], ["c-2.png"]]


def test_many_of_one_name_take_no_longer_than_others(tmp_path: Path) -> None:
    paths = ResultPaths([])
    assert len({paths.take(tmp_path, "a", [".png"])[0] for _ in range(3000)}) == 3000


def test_folders_and_files_that_are_read(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "link").symlink_to(images)
    for folder in (images, images / "drawn", images / "x" / "..", tmp_path / "link" / "drawn"):
        with pytest.raises(UserError, match="the next run would take results for images"):
            check_no_input_folder(folder, [images])
    check_no_input_folder(tmp_path / "images-drawn", [images])
    check_no_input_folder(tmp_path, [images])
    (images / "a.png").touch()
    check_parent(str(images / "b.json"), [images / "a.png", None])
    with pytest.raises(UserError, match="the command reads it"):
        check_parent(str(tmp_path / "link" / "a.png"), [images / "a.png"])


def test_two_results_are_two_files(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a.json")
    check_apart({"--a": tmp_path / "a.json", "--b": str(tmp_path / "b.json"), "--c": None})
    check_apart({"--a": "", "--b": ""})
    check_apart({"--a": "/dev/null", "--b": "/dev/null"})
    for other in ("a.json", "A.json", "../" + tmp_path.name + "/a.json", "link"):
        with pytest.raises(UserError, match="^--a and --c are both .*: give each its own$"):
            check_apart({"--a": tmp_path / "a.json", "--b": "b", "--c": f"{tmp_path}/{other}"})


def test_results_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "a.json")
    (tmp_path / "read.json").touch()
    good = tmp_path / "a.json"
    check_results({"--a": good, "--b": None, "--c": "", "--d": tmp_path / "read.json"}, [None])
    for name, says in (
        ("gone/a.json", "its folder does not exist"),
        ("link", "its folder does not exist"),
        ("../" + tmp_path.name, "it is a folder"),
        ("read.json", "the command reads it"),
        ("a.json", "--a and --b are both"),
    ):
        with pytest.raises(UserError, match=says):
            check_results({"--a": good, "--b": tmp_path / name}, [tmp_path / "read.json"])


@pytest.mark.parametrize("name", ["image", "checkpoint"])
def test_results_of_predict_take_no_inputs_place(
    name: str, images: Path, checkpoint: Path, command: Command, tmp_path: Path
) -> None:
    image = tmp_path / "a.png"
    image.write_bytes((images / "val/ant/0.png").read_bytes())
    file = tmp_path / "best.safetensors"
    file.write_bytes(checkpoint.read_bytes())
    before = image.read_bytes(), file.read_bytes()
    target = image if name == "image" else file
    for words in (image, "--checkpoint", file), (tmp_path, "--checkpoint", file):
        result = command("predict", *words, "--results-file", target)
        assert result.code == 2 and "the command reads it" in result.err
    assert (image.read_bytes(), file.read_bytes()) == before


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    target.parent.mkdir()
    link.symlink_to(target)
    for text in ("new", "newer"):  # the link leads to nothing at first
        write_text(link, text)
        assert link.is_symlink() and target.read_text() == text
    assert sorted(tmp_path.rglob("*")) == [target.parent, target, link]
    # under another name, the link itself is kept
    write_atomically(link, lambda file: file.write_text("newest"), keep=tmp_path / "kept")
    assert not link.is_symlink() and link.read_text() == "newest"
    assert (tmp_path / "kept").read_text() == target.read_text() == "newer"


def test_pipes_stay(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write_text(pipe, "text")
    reader.join(10)
    assert read == ["text"] and stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]


def test_standard_output_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also where it goes to a file, as it does here."""
    link = tmp_path / "link"
    link.symlink_to("/dev/stdout")
    print("before")
    write_text(Path("/dev/stdout"), "text\n")
    write_text(link, "more\n")
    print("after")
    assert capfd.readouterr().out == "before\ntext\nmore\nafter\n"
    assert link.is_symlink()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS])
def test_folders_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    file, sync = tmp_path / "file", os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write_text(file, "text")
    assert file.read_text() == "text"
    number = errno.EIO
    with pytest.raises(UserError, match="cannot write .*: Input/output error$"):
        write_text(file, "text")
