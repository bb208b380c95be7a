"""Pytest hooks: which tests run, what their marks say, and what is printed after them.

conftest.py hands them to pytest. ``--quick`` keeps the tests marked `quick`, ``--nightly`` adds
those marked `nightly`, which are left out otherwise.
"""

import os
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
SLOW = 10.0  # seconds of processor time from which a test has to be marked slow
STARTED = 2.0  # seconds of processor time in other processes; importing torch takes more
PEER_RESULT = "peer_suite"  # the user property under which tests/peer records what it ran
COST = "processor_seconds"
UNMARKED = "mark_that_is_missing"
# The rooms of vitlinear/ that the selected tests touch, and whether all of tests/ was collected.
QUICK_ROOMS = pytest.StashKey[set[str]]()

# Each of their tests takes the longest: first, so that no process of several waits for them alone.
FIRST = (TESTS / "ops" / "triton" / "test_interpreter.py", TESTS / "peer")

_clock = pytest.StashKey[tuple[float, float, int]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vitlinear")
    group.addoption("--quick", action="store_true", help="run the inner loop only")
    group.addoption("--nightly", action="store_true", help="run the nightly tests too")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Passes over files without a quick test in quick runs: importing them all takes longer."""
    if not (config.getoption("--quick") and collection_path.suffix == ".py"):
        return None
    return True if "mark.quick" not in collection_path.read_text(encoding="utf-8") else None


def rooms_of(item: pytest.Item) -> set[str]:
    """The rooms of vitlinear/ that a quick test touches: named in its mark, or its own folder."""
    named = {room for mark in item.iter_markers("quick") for room in mark.args}
    return named or {item.path.relative_to(TESTS).parts[0]}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks tests by their folder, skips those that lack a GPU, and leaves out what was not asked.

    Puts the longest ones first.

    First of all such hooks, so that it sees every test before ``-k`` and ``-m`` choose.
    """
    config.stash[QUICK_ROOMS] = set()
    kept, left_out = [], []
    for item in items:
        if item.path.is_relative_to(TESTS / "peer"):
            item.add_marker("peer")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        quick, nightly = (bool(item.get_closest_marker(name)) for name in ("quick", "nightly"))
        if quick and not nightly:
            config.stash[QUICK_ROOMS] |= rooms_of(item)
        wanted = config.getoption("--nightly") or not nightly
        if config.getoption("--quick"):
            wanted = quick and not nightly
        (kept if wanted else left_out).append(item)
    items[:] = sorted(kept, key=lambda item: not any(map(item.path.is_relative_to, FIRST)))
    if left_out:
        config.hook.pytest_deselected(items=left_out)


def used() -> tuple[float, float, int]:
    """Processor seconds of this process and of those it waited for; frames Dynamo has compiled."""
    times = os.times()
    dynamo = sys.modules.get("torch._dynamo.utils")
    frames = dynamo.counters["frames"]["total"] if dynamo else 0
    return times.user + times.system, times.children_user + times.children_system, frames


def missing_marks(own: float, others: float, compiled: int) -> list[str]:
    """The marks that a test needs for what it used."""
    needed = {"slow": own + others > SLOW, "process": others > STARTED, "compile": compiled > 0}
    return [mark for mark, holds in needed.items() if holds]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Notes in each report what its phase cost, and in the test's own which marks it lacks."""
    report = yield
    now, before = used(), item.stash.get(_clock, None)
    item.stash[_clock] = now
    if before is not None:
        own, others, compiled = (b - a for a, b in zip(before, now, strict=True))
        report.user_properties.append((COST, own + others))
        if call.when == "call":
            report.user_properties += [
                (UNMARKED, mark)
                for mark in missing_marks(own, others, compiled)
                if not item.get_closest_marker(mark)
            ]
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Begins to count before the fixtures are set up."""
    item.stash[_clock] = used()
    return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what timm's suite ran, what each folder cost, and which marks are missing.

    Properties of reports are what travels from the processes of pytest-xdist to the one that
    prints; captured output does not.
    """
    cost, count = defaultdict[str, float](float), Counter[str]()
    peer, unmarked = [], []
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == COST:
                    folder = report.nodeid.partition("::")[0].rpartition("/")[0]
                    cost[folder] += value
                    count[folder] += report.when == "call"
                elif name == UNMARKED:
                    unmarked.append(f"{value}: {report.nodeid}")
                elif name == PEER_RESULT and report.when == "call":
                    peer.append(value)
    sections = {
        "timm's own test suite on our models": sorted(peer),
        "processor time by folder": [
            f"{cost[folder]:7.0f} s {count[folder]:6} tests  {folder}" for folder in sorted(cost)
        ],
        "marks that are missing": sorted(unmarked),
    }
    if len(cost) < 2:
        del sections["processor time by folder"]
    for title, lines in sections.items():
        if lines:
            terminalreporter.section(title)
            for line in lines:
                terminalreporter.write_line(line)
