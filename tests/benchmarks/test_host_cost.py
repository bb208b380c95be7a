"""Calls and time before the kernels stay near those of an empty autograd function.

Calls are counted in every run, as their number is the same on every machine; time by night.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks.host_cost import (  # noqa: E402
    Cost,
    ReadSubject,
    StateSubject,
    Subject,
    without_launches,
)
from vitlinear import ops  # noqa: E402
from vitlinear.ops.triton import INTERPRETING  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETING, reason="the interpreter launches nothing")

# Of the empty function's calls, forward and backward. Checks of a call weigh more where there is
# less to do than in an attention: a state saves no query, and a read launches one kernel. Versions
# of Python and PyTorch differ by some calls.
MOST_CALLS = {Subject: (2.3, 1.9), StateSubject: (3.75, 2.35), ReadSubject: (3.0, 2.65)}
# Of its time. A custom operator alone, without kernels, takes seven times it.
MOST = 2.0
# A read launches one kernel and allocates one tensor: what checks of a call take weighs more.
MOST_OF_READ = 2.5
ROUNDS = 20  # until one is quiet enough: other work on the machine only adds


def least(a: Cost, b: Cost) -> Cost:
    return a._replace(ours=min(a.ours, b.ours), empty=min(a.empty, b.empty))


def count_calls(step: Callable[[], Any]) -> tuple[Any, int]:
    """The value of a step, and the number of functions that it calls, of Python and of C."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        result = step()
    finally:
        sys.setprofile(None)
    return result, count


@pytest.mark.parametrize("mechanism", ops.MECHANISMS)
@pytest.mark.parametrize("kind", MOST_CALLS)
def test_calls(kind: type[Subject], mechanism: str) -> None:
    if kind is StateSubject and ops.get_mechanism(mechanism).has_global_query:
        pytest.skip("has no state without queries")
    with without_launches() as launched:
        subject = kind(mechanism, launched)
        assert all(number >= 1 for number in subject.launches())
        subject.differentiate(subject.call())
        found = {}
        for who, run in (("ours", subject.call), ("empty", subject.empty)):
            out, forward = count_calls(run)
            _, backward = count_calls(lambda out=out: subject.differentiate(out))
            found[who] = (forward, backward)
    for ours, empty, most in zip(found["ours"], found["empty"], MOST_CALLS[kind], strict=True):
        assert ours <= most * empty, found


def check(kind: type[Subject], mechanism: str) -> None:
    with without_launches() as launched:
        subject = kind(mechanism, launched)
        most = [MOST_OF_READ if kind is ReadSubject else MOST, MOST]
        costs = subject.costs(calls=300)
        for _ in range(ROUNDS):
            if all(cost.ratio <= limit for cost, limit in zip(costs, most, strict=True)):
                break
            costs = tuple(map(least, costs, subject.costs(calls=300)))
    for cost, limit in zip(costs, most, strict=True):
        assert cost.launches >= 1
        assert cost.ratio <= limit, cost


@pytest.mark.nightly
@pytest.mark.parametrize("mechanism", ops.MECHANISMS)
def test_attention(mechanism: str) -> None:
    check(Subject, mechanism)


@pytest.mark.nightly
@pytest.mark.parametrize("mechanism", ["mala", "elu"])
@pytest.mark.parametrize("kind", [StateSubject, ReadSubject])
def test_states(kind: type[Subject], mechanism: str) -> None:
    check(kind, mechanism)
