"""Holds for every test: one thread, repeatable examples, memory given back after each file."""

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
# The first backward pass of a process starts a thread for each device, and no process that is
# forked after that can run one. Fake tensors count as a GPU where there is none: before them.
torch.ones(1, requires_grad=True).sum().backward()

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

# What chooses the tests and says what they cost; their random numbers; fixtures that several
# folders share; pytest's own runner, for the tests of the first two.
pytest_plugins = ["tests.selection", "tests.seeds", "tests.commands", "pytester"]


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


@pytest.fixture(scope="module")
def all_memory_free() -> Iterator[None]:
    """For `vitlinear.stream`, whose bound counts what this process holds: other tests left it.

    In processes that fork from this one for a file, too.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitlinear.streaming.run.resident", lambda: 0)
        yield


@pytest.fixture(autouse=True)
def nothing_compiled_yet(request: pytest.FixtureRequest) -> None:
    """Programs are made for the sizes of one test: others seen before make sizes dynamic."""
    if request.node.get_closest_marker("compile"):
        torch._dynamo.reset()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Leaves a million objects of modules to themselves: garbage collection takes seconds there."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def memory_given_back() -> Iterator[None]:
    """Returns what a file's tests freed to the system: tools/run_tests.py has glibc keep it."""
    yield
    gc.collect()
    gc.freeze()  # modules that it imported
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
