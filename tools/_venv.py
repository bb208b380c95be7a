"""The environment that quickstart.py and run_tests.py share: made once, reused while it fits.

Standard library only, and syntax that an old Python can still parse: the first thing to say on one
is which Python is needed, not a traceback.
"""

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import venv
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

OLDEST_PYTHON = (3, 10)
if sys.version_info < OLDEST_PYTHON:
    sys.exit(
        "error: vitlinear needs Python {}.{} or newer; this is {} ({})".format(
            *OLDEST_PYTHON, sys.version.split()[0], sys.executable
        )
    )

ROOT = Path(__file__).resolve().parent.parent
STAMP_NAME = "vitlinear-install.json"
# Which versions an environment has: those of constraints.txt, or the highest or the lowest that
# pyproject.toml allows.
PINNED, NEWEST, OLDEST = "pinned", "newest", "oldest"
DAY = 86400  # seconds after which the newest versions are asked for again
# What pip says, in order of preference, when the cause is one the reader can do something about.
_CAUSES = (
    (r"No space left on device", "the disk is full; torch and its CUDA libraries take about 6 GB"),
    (
        r"Temporary failure in name resolution|Name or service not known|getaddrinfo failed"
        r"|Failed to establish a new connection|ConnectTimeout|Network is unreachable"
        r"|Connection refused|ProxyError|Tunnel connection failed|Could not connect",
        "no package index could be reached; check the network, or point PIP_INDEX_URL at a mirror",
    ),
    (
        r"Killed signal terminated program",
        "compiling mmcv's operators ran out of memory; MAX_JOBS=1 compiles one file at a time",
    ),
    (
        r"Error compiling objects|error: command '[^']*(g\+\+|gcc|c\+\+|cc|clang)' failed"
        r"|No such file or directory: '[^']*(g\+\+|gcc|c\+\+)'",
        "mmcv's operators could not be compiled; they need a C++ compiler and Python's headers (on "
        "Debian or Ubuntu: apt install g++ python3-dev). VITLINEAR_WITHOUT=openmmlab leaves them "
        "out, and the tests that need them",
    ),
    (
        r"No matching distribution found|ResolutionImpossible",
        "a pinned package does not exist for this Python and platform; see constraints.txt",
    ),
)
# mmcv's operators are compiled against the torch that is installed, which pip's isolated builds do
# not see: this extra comes last, and with it what they are built with.
COMPILED = "openmmlab"
BUILD_TOOLS = ["setuptools", "wheel", "packaging", "ninja", "psutil"]
# Lines that pip prints by the hundred and that nobody watches an install for.
_NOISE = re.compile(
    r"Requirement already satisfied|Using cached|\[notice\]|^\s*$|^Looking in|WARNING: Location"
)


class SetupError(Exception):
    """A failure in one line that says what to do, and the exit status that it means."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def venv_dir(versions: str = PINNED) -> Path:
    """Where an environment lives: ``.venv`` here, or ``$VITLINEAR_VENV``; others stand beside it.

    Their names have the choice of versions as a suffix: ``.venv-newest``.
    """
    folder = Path(os.environ.get("VITLINEAR_VENV") or ROOT / ".venv").absolute()
    return folder if versions == PINNED else folder.with_name(f"{folder.name}-{versions}")


def program(name: str, versions: str = PINNED) -> Path:
    """The path of a program inside an environment, such as ``python`` or ``vitlinear``."""
    windows = os.name == "nt"
    folder = venv_dir(versions) / ("Scripts" if windows else "bin")
    return folder / (name + (".exe" if windows else ""))


def say(message: str) -> None:
    """Prints one progress line at once, also into a pipe."""
    print("==> " + message, flush=True)


def ensure(extras: list[str], versions: str = PINNED) -> Path:
    """Makes sure an environment has vitlinear, editable, with these extras.

    A stamp file, written only after an install that succeeded, records what the environment was
    made from. While it matches, nothing is installed. An environment made for other extras is
    extended, never narrowed, so that the two commands can share one. The newest versions are asked
    for again after a day.

    Args:
        extras: names from ``[project.optional-dependencies]``.
        versions: ``PINNED``, ``NEWEST`` or ``OLDEST``.

    Returns:
        The environment's Python.

    Raises:
        SetupError: Python lacks venv, there is no network or disk space, or pip failed.
    """
    python, stamp = program("python", versions), venv_dir(versions) / STAMP_NAME
    usable = python.exists() and _runs(python)
    recorded = _read_stamp(stamp) if usable else {}
    made_from = _fingerprint(versions)
    same = recorded.get("made_from") == made_from
    if versions == NEWEST:
        same = same and time.time() - stamp.stat().st_mtime < DAY
    if same and set(extras) <= set(recorded["extras"]):
        return python

    wanted = sorted(set(extras) | set(recorded.get("extras", ())))
    started = time.monotonic()
    if not usable:
        _create(venv_dir(versions))
    stamp.unlink(missing_ok=True)
    say(f"installing vitlinear[{','.join(wanted)}] with the {versions} versions")
    if not recorded:
        say("the first time, torch is downloaded: about 3 GB, a few minutes")
    _pip_install(python, wanted, versions)
    stamp.write_text(json.dumps({"made_from": made_from, "extras": wanted}) + "\n")
    say(f"environment ready after {time.monotonic() - started:.0f} s: {venv_dir(versions)}")
    return python


def run(command: list[str | Path]) -> int:
    """Runs a command from the repository root and returns its exit status."""
    return subprocess.call([str(part) for part in command], cwd=ROOT)


def output(command: list[str | Path]) -> str:
    """Runs a command from the repository root and returns what it printed, stripped.

    Raises:
        SetupError: the command failed; its own message has been printed.
    """
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SetupError(f"{Path(command[0]).name} failed", done.returncode)
    return done.stdout.strip()


def script(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs a script's main function and exits with its status; errors take one line."""
    try:
        sys.exit(main(sys.argv[1:]))
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        sys.exit(130)


def oldest(extras: list[str]) -> str:
    """A file of constraints: the lower bound of each requirement in pyproject.toml.

    Bounds of ``dev`` do not count: no user installs them, and no test is about them.

    Args:
        extras: which of ``[project.optional-dependencies]`` count beside the dependencies.
    """
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lines = []
    for name in ("dependencies", *(extra for extra in extras if extra != "dev")):
        found = re.search(rf"^{name} = \[(.*?)\](\s*#.*)?$", text, re.MULTILINE | re.DOTALL)
        if found is None:
            raise SetupError(f"pyproject.toml has no list {name}")
        lines += [f"{x}=={bound}" for x, bound in re.findall(r'"([\w.-]+)>=([\w.]+)', found[1])]
    return "\n".join(lines) + "\n"


def _fingerprint(versions: str) -> str:
    digest = hashlib.sha256(versions.encode())
    for name in (
        ("pyproject.toml", "constraints.txt") if versions == PINNED else ("pyproject.toml",)
    ):
        digest.update((ROOT / name).read_bytes())
    digest.update(str(ROOT).encode())  # an editable install points at this folder
    return digest.hexdigest()


def _read_stamp(stamp: Path) -> dict[str, Any]:
    try:
        content = json.loads(stamp.read_text())
        return content if {"made_from", "extras"} <= set(content) else {}
    except (OSError, ValueError, TypeError):
        return {}


def _runs(python: Path) -> bool:
    """Whether the environment's Python starts, is new enough and has pip."""
    check = f"import sys, pip; sys.exit(sys.version_info < {OLDEST_PYTHON})"
    try:
        return subprocess.run([str(python), "-c", check], capture_output=True).returncode == 0
    except OSError:
        return False


def _create(folder: Path) -> None:
    if importlib.util.find_spec("ensurepip") is None:
        # Debian and Ubuntu split it off, and say so only after half an environment exists.
        raise SetupError(
            "this Python cannot make virtual environments: ensurepip is missing. "
            "On Debian or Ubuntu: apt install python3-venv "
            f"(or python{sys.version_info[0]}.{sys.version_info[1]}-venv)"
        )
    say(f"making {folder} with Python {sys.version.split()[0]}")
    try:
        venv.EnvBuilder(clear=True, with_pip=True, symlinks=os.name != "nt").create(folder)
    except subprocess.CalledProcessError as error:
        raise SetupError(
            f"pip could not be put into {folder} (ensurepip exit status {error.returncode}). "
            "On Debian or Ubuntu: apt install python3-venv"
        ) from error
    except OSError as error:
        raise SetupError(f"cannot make {folder}: {error.strerror}") from error


def _pip_install(python: Path, extras: list[str], versions: str) -> None:
    log = venv_dir(versions) / "install.log"
    log.unlink(missing_ok=True)
    chosen = ["-c", "constraints.txt"]
    if versions == NEWEST:
        chosen = ["--upgrade", "--upgrade-strategy", "eager"]
    elif versions == OLDEST:
        bounds = venv_dir(versions) / "oldest.txt"
        bounds.write_text(oldest(extras))
        chosen = ["-c", str(bounds)]
    plain = [extra for extra in extras if extra != COMPILED]
    _pip(python, log, [*chosen, "-e", f".[{','.join(plain)}]"])
    if COMPILED not in extras:
        return
    try:
        _compile(python, log, extras, chosen)
    except SetupError as error:
        if versions == PINNED:
            raise
        # One made for another torch may be there, and load: its tests would run, and fail.
        remove = [str(python), "-m", "pip", "uninstall", "--yes", "--quiet", "onedl-mmcv"]
        subprocess.run(remove, capture_output=True)
        say(f"without {COMPILED}, and its tests will skip: {error}")


def _compile(python: Path, log: Path, extras: list[str], chosen: list[str]) -> None:
    say("mmcv's operators are compiled once, then pip has them: about 20 minutes on two cores")
    _pip(python, log, [*chosen, *BUILD_TOOLS])
    _pip(python, log, [*chosen, "--no-build-isolation", "-e", f".[{','.join(extras)}]"])
    if not _works(python):
        # pip's cache tells wheels apart by the package's version, not by torch's.
        say("the mmcv at hand was compiled against another torch: compiling it again")
        again = ["--no-cache-dir", "--force-reinstall", "--no-deps", "onedl-mmcv"]
        _pip(python, log, [*chosen, "--no-build-isolation", *again])
        if not _works(python):
            raise SetupError(f"mmcv's operators cannot be loaded (log: {log})")


def _works(python: Path) -> bool:
    """Whether mmcv's operators work: one made for another torch may load and then fail to run."""
    program = "import torch, mmcv.ops as ops; x = torch.eye(4); ops.nms(x, x[0].clone(), 0.5)"
    return subprocess.run([str(python), "-c", program], capture_output=True).returncode == 0


def _pip(python: Path, log: Path, arguments: list[str]) -> None:
    command = [str(python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--retries", "3", *arguments]
    tail: deque[str] = deque(maxlen=200)
    with log.open("a") as copy:
        pip = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert pip.stdout is not None
        for line in pip.stdout:
            copy.write(line)
            tail.append(line)
            if not _NOISE.search(line):
                print("    " + line.rstrip(), flush=True)
        status = pip.wait()
    if status:
        raise SetupError(_explain("".join(tail), status, log))


def _explain(output: str, status: int, log: Path) -> str:
    for pattern, cause in _CAUSES:
        if re.search(pattern, output):
            return f"{cause} (log: {log})"
    return f"pip failed with exit status {status}; its output is in {log}"
