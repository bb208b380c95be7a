"""The commit of the running code, versions of packages, and git's answers about a folder."""

import contextlib
import importlib.metadata
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

GIT_SECONDS = 60  # on a slow network disk


def source_commit() -> str | None:
    """Returns the commit of vitlinear's checkout, ``-dirty`` behind it if files differ; or None."""
    source = Path(__file__).parent
    if git(source, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = git(source, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    return commit.decode().strip() if commit else None


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of those of the packages that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git(place: Path, *arguments: str) -> bytes | None:
    """Returns what git prints, or None where there is no git, no repository or no such thing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(place), "--no-optional-locks", *arguments],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            # Those of a hook that we may run under name another repository.
            env={name: value for name, value in os.environ.items() if name[:4] != "GIT_"},
            timeout=GIT_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
