"""States: two are kept, damage is noticed, a full disk costs nothing that was there."""

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from vitlinear.errors import UserError
from vitlinear.files import write_text
from vitlinear.processes import Processes
from vitlinear.train import resume
from vitlinear.train.record.saved_state import read_newest, read_state, save_state


def state(updates: int) -> dict[str, object]:
    return {"updates": updates, "tensor": torch.full((1000,), float(updates))}


def damage(path: Path) -> None:
    """Flips one bit of a tensor, which torch.load does not notice."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)


@pytest.mark.quick
def test_the_last_two_are_kept_and_the_newest_whole_one_is_read(tmp_path: Path) -> None:
    assert read_newest(tmp_path) == (None, None)
    last, previous = tmp_path / "last_state.pt", tmp_path / "previous_state.pt"
    for updates in (1, 2, 3):
        save_state(last, state(updates))
    assert sorted(tmp_path.iterdir()) == [last, previous]
    assert read_state(previous)["updates"] == 2
    newest, note = read_newest(tmp_path)
    assert newest is not None and newest["updates"] == 3 and note is None

    damage(last)
    newest, note = read_newest(tmp_path)
    assert newest is not None and newest["updates"] == 2 and note is not None
    assert "last_state.pt is truncated, corrupt" in note and "previous_state.pt, 2 updates" in note
    last.unlink()  # killed between the two renames
    newest, note = read_newest(tmp_path)
    assert newest is not None and newest["updates"] == 2
    damage(previous)
    with pytest.raises(UserError, match="previous_state.pt is truncated, corrupt"):
        read_newest(tmp_path)


@pytest.mark.parametrize("first", [True, False], ids=["nothing-there", "one-there"])
def test_a_full_disk_keeps_what_was_there(tmp_path: Path, first: bool) -> None:
    """The file size limit of the process fails a write as a full disk does."""
    last = tmp_path / "last_state.pt"
    if not first:
        save_state(last, state(1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(UserError, match="cannot write .*last_state.pt: File too large") as info:
            save_state(last, state(2))
        with pytest.raises(UserError, match="cannot write .*text: File too large$"):
            write_text(tmp_path / "text", "x" * 3000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ("what was there before is kept" in str(info.value)) is not first
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("found", [None, {"epoch": 1, "batch": 0, "updates": 7}])
def test_processes_that_found_unlike_states(
    found: dict[str, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that found none asks the others too, or they would wait for it."""
    there = (1, 0, 7)

    def gather(places: list[Any], place: Any) -> None:
        places[:] = [there, place]

    monkeypatch.setattr(resume.distributed, "all_gather_object", gather)
    processes = Processes(rank=1, world_size=2)
    if found:
        resume.check_same_place(processes, found)
        return
    with pytest.raises(UserError, match=r"process 0 that of update 7, process 1 none"):
        resume.check_same_place(processes, found)
