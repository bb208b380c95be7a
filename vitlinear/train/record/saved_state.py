"""The last two states of a run as files, each whole and verified: resuming needs one.

A state is tensors, numbers, strings and containers only. It is written as ``last_state.pt``; the
one before it becomes ``previous_state.pt``, so that damage to the newer, or death between the two
renames, costs an interval and not the run.
"""

import zipfile
from pathlib import Path
from typing import Any

import torch

from vitlinear.checkpoints.read import read_saved
from vitlinear.errors import UserError
from vitlinear.files import write_atomically

from .folder import PREVIOUS_STATE, STATE

STATE_VERSION = 2
WANTED = f"; --resume wants a {STATE}"


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes the state of a run, keeping the one before.

    Raises:
        UserError: It cannot be written, for want of space, say; the last one is still there.
    """
    state = {"version": STATE_VERSION, **state}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # torch's own writer hides why it failed
            torch.save(state, file)

    write_atomically(path, write, keep=path.with_name(PREVIOUS_STATE))


def read_state(path: Path) -> dict[str, Any]:
    """Reads a state without running code from it, and verifies its checksums.

    Raises:
        UserError: Missing, damaged, or not a training state.
    """
    if not path.is_file():
        raise UserError(f"cannot resume: {path} does not exist{WANTED}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load compares no checksums
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(damaged)
        # In memory: the next state takes this one's place while its tensors are in use.
        state = read_saved(path, mmap=False)
    except (OSError, ValueError, zipfile.BadZipFile) as error:  # CheckpointErrors are ValueErrors
        raise UserError(f"cannot resume: {path} is truncated, corrupt or not a {STATE}") from error
    if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
        raise UserError(f"cannot resume: {path} is not a training state of this version")
    return state


def read_newest(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    """Reads the newest whole state in a run folder.

    Returns:
        The state, None where there is none yet; and a line for the user if it is not the last.

    Raises:
        UserError: There are states, and none of them is whole.
    """
    last, previous = folder / STATE, folder / PREVIOUS_STATE
    if not previous.is_file():
        return (read_state(last), None) if last.is_file() else (None, None)
    try:
        return read_state(last), None
    except UserError as error:
        state = read_state(previous)
        reason = str(error).removeprefix("cannot resume: ").removesuffix(WANTED)
        return state, f"{reason}: going on from {previous}, {state['updates']} updates"
