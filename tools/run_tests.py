#!/usr/bin/env python3
"""Runs the test suite from a bare checkout: makes ``.venv`` if it has to, then pytest in it.

    python3 tools/run_tests.py              # the whole suite, as continuous integration does
    python3 tools/run_tests.py --quick      # the inner loop: a little of every room
    python3 tools/run_tests.py --nightly    # the whole suite, and the rest of its products
    python3 tools/run_tests.py --newest     # in .venv-newest: the newest versions that pip finds
    python3 tools/run_tests.py --oldest     # in .venv-oldest: the oldest that pyproject.toml allows
    python3 tools/run_tests.py -k ravlt -x  # what follows is handed to pytest

Tests run in two processes, each with one thread; ``-n 0`` runs them in one, and
``VITLINEAR_TEST_WORKERS`` sets another number.

The first time, mmcv's operators are compiled, which needs a C++ compiler and about 20 minutes on
two cores. ``VITLINEAR_WITHOUT=openmmlab`` leaves them out; tests that need them then skip. So they
do where ``--newest`` or ``--oldest`` cannot compile them.
"""

import os

import _venv

EXTRAS = ["dev", "train", "data", "export", "openvino", "wsi", "geo", "analysis", "openmmlab"]
WITHOUT = os.environ.get("VITLINEAR_WITHOUT", "").split(",")
# The one place that says how the suite is spread over processes.
WORKERS = os.environ.get("VITLINEAR_TEST_WORKERS", "2")
# glibc keeps the memory of large tensors for the next ones. Otherwise it asks the kernel for zeroed
# pages each time, which takes up to a fifth of the time of a test that updates a large model.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**32)}


def main(arguments: list[str]) -> int:
    """Prepares the environment and returns pytest's exit status."""
    chosen = [name for name in (_venv.NEWEST, _venv.OLDEST) if f"--{name}" in arguments]
    if len(chosen) > 1:
        raise _venv.SetupError("--newest and --oldest are two environments; choose one")
    versions = chosen[0] if chosen else _venv.PINNED
    python = _venv.ensure([extra for extra in EXTRAS if extra not in WITHOUT], versions)
    os.environ.update(ALLOCATOR)
    spread = ["-n", WORKERS, "--dist", "worksteal"] if WORKERS != "0" else []
    rest = [argument for argument in arguments if argument != f"--{versions}"]
    return _venv.run([python, "-m", "pytest", *spread, *rest])


if __name__ == "__main__":
    _venv.script(main)
