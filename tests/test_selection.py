"""tests/selection.py and tests/pairwise.py: which tests run, and what is said of them."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests import selection
from tests.pairwise import cover, pairwise
from tests.selection import QUICK_ROOMS, TESTS, missing_marks, rooms_of

PACKAGE = TESTS.parent / "vitlinear"


@pytest.mark.quick("tests")
def test_every_room_has_a_quick_test(request: pytest.FixtureRequest) -> None:
    """And no mark names a room that is not there."""
    if not any((TESTS.parent / argument).resolve() == TESTS for argument in request.config.args):
        pytest.skip("only a part of the tests was collected")
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    outside = {"tests", "tools", "benchmarks"}
    assert request.config.stash[QUICK_ROOMS] == rooms | outside


def test_without_a_name_the_room_is_the_folder(request: pytest.FixtureRequest) -> None:
    assert rooms_of(request.node) == {"test_selection.py"}
    request.node.add_marker(pytest.mark.quick("export", "cli"))
    assert rooms_of(request.node) == {"export", "cli"}


@pytest.fixture
def a_run(pytester: pytest.Pytester) -> pytest.Pytester:
    """Three tests, one of each choice, under the hooks."""
    pytester.makeconftest("from tests.selection import *")
    pytester.makepyfile("""
        import pytest

        @pytest.mark.quick("ops")
        def test_a(): pass

        @pytest.mark.nightly
        def test_b(): pass

        @pytest.mark.slow
        def test_c(): pass
    """)
    return pytester


@pytest.mark.parametrize(
    ("flags", "passed"), [(["--quick"], 1), ([], 2), (["--nightly"], 3), (["-m", "nightly"], 0)]
)
def test_flags_choose(a_run: pytest.Pytester, flags: list[str], passed: int) -> None:
    result = a_run.runpytest_inprocess("-p", "no:cacheprovider", *flags)
    result.assert_outcomes(passed=passed, deselected=3 - passed)


def test_marks_that_are_missing_are_told(
    a_run: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(selection, "SLOW", -1.0)
        output = a_run.runpytest_inprocess("-p", "no:cacheprovider").stdout.str()
    assert "slow: test_marks_that_are_missing_are_told.py::test_a" in output
    assert "::test_c" not in output


@pytest.mark.parametrize("sizes", [(3, 2), (4, 3, 2), (13, 2, 3, 2), (9, 2, 2, 2, 4)], ids=str)
def test_every_pair_is_covered_by_few_rows(sizes: tuple[int, ...]) -> None:
    rows = cover(sizes)
    for i, j in combinations(range(len(sizes)), 2):
        seen = {(row[i], row[j]) for row in rows}
        assert seen == set(product(range(sizes[i]), range(sizes[j])))
    largest = sorted(sizes)[-2:]
    assert largest[0] * largest[1] <= len(rows) <= 1.5 * largest[0] * largest[1]


def test_pairwise_keeps_the_product_for_the_night() -> None:
    mark = pairwise(a=["x", "y"], b=[False, True], c={(1, 2): "keys", (): "count"}).mark
    names, cases = mark.args
    assert names == ["a", "b", "c"]
    assert sorted(case.id for case in cases) == sorted(
        f"{a}-{b}-{c}" for a in "xy" for b in ("b", "no_b") for c in ("1x2", "no_c")
    )
    assert {case.values for case in cases if not case.marks} < {case.values for case in cases}
    assert {mark.name for case in cases for mark in case.marks} == {"nightly"}


@pytest.mark.parametrize(
    ("used", "marks"),
    [
        ((9.0, 0.1, 0), []),
        ((8.0, 3.0, 0), ["slow", "process"]),
        ((1.0, 0.0, 2), ["compile"]),
    ],
)
def test_marks_say_what_a_test_used(used: tuple[float, float, int], marks: list[str]) -> None:
    assert missing_marks(*used) == marks
