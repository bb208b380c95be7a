"""The exception and the warning that command-line tools turn into one line, and that line."""

import difflib
import shlex
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """A mistake in what the user asked for; the message says what was wrong and what to do.

    Tools print it as ``error: <message>`` and exit with status 2, without a traceback.
    """


class LostPeerError(UserError):
    """Another process of the run ended or is silent; its own message says why."""


class Notice(UserWarning):
    """Something that was decided and that a user should know, in one line.

    `warnings.warn` gives it to programs; commands print it as ``note: <message>``.
    """


def one_line(error: BaseException) -> str:
    """Returns what another library's error says, without its line breaks; its name if nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def pip_install(extra: str) -> str:
    """Returns the command that installs what an extra of this package brings.

    Of a checkout pip needs the folder: it would look for the name in an index.
    """
    folder = Path(__file__).parents[1]
    if (folder / "pyproject.toml").is_file():
        return f"pip install -e {shlex.quote(f'{folder}[{extra}]')}"
    return f"pip install {shlex.quote(f'vitlinear[{extra}]')}"


def check_choice(what: str, name: str, choices: Iterable[str]) -> None:
    """Raises `UserError` if a name is none of those that there are.

    Args:
        what: The kind of thing, such as ``"layout"``.
        name: What was given.
        choices: The names that there are.
    """
    choices = list(choices)
    if name not in choices:
        raise UserError(unknown_choice(what, name, choices))


def unknown_choice(what: str, name: str, choices: Iterable[str]) -> str:
    """Returns the sentence on a name that is none of those that there are; as `check_choice`."""
    choices = list(choices)
    near = did_you_mean(str(name), choices)
    return f"unknown {what} {name!r}{near}: use one of {', '.join(choices)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ``" (did you mean a, b?)"`` for near misses of ``name``, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" (did you mean {', '.join(near)}?)" if near else ""
