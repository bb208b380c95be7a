"""What holds for every test: one thread, one rule for GPU tests, the peer suite's summary."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: several pytest processes share the cores, and one thread sums in one
# order, so a result does not depend on the machine's core count.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import pytest  # noqa: E402  (the thread counts come first)
import torch  # noqa: E402

torch.set_num_threads(1)

# Held to the end: see `vitlinear.processes`. The destructor of a group whose last reference is
# that of DDP can wait for ever, and no timeout reaches it.
_PROCESS_GROUPS: list[object] = []

try:
    from hypothesis import settings
except ImportError:  # tools/gpu_check.sh does without
    pass
else:
    # The same examples at each run: a red run is one that anybody can repeat. To look for new
    # ones: pytest --hypothesis-profile default
    settings.register_profile("repeatable", derandomize=True, database=None)
    settings.load_profile("repeatable")

PEER_RESULT = "peer_suite"  # the user property under which tests/peer records what it ran


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone, over gloo."""
    from torch import distributed

    store = f"file://{tmp_path / 'process_group'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    _PROCESS_GROUPS.append(distributed.group.WORLD)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module", autouse=True)
def memory_given_back() -> Iterator[None]:
    """Returns what a file's tests freed to the system: tools/run_tests.py has glibc keep it."""
    yield
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked ``gpu`` where there is no CUDA device; the summary says how many."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what timm's suite ran inside the tests of tests/peer.

    It stands here because with pytest-xdist only the root conftest is loaded in the process that
    prints; test properties travel to it, captured output does not.
    """
    lines = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == PEER_RESULT
    ]
    if lines:
        terminalreporter.section("timm's own test suite on our models")
        for line in sorted(lines):
            terminalreporter.write_line(line)
