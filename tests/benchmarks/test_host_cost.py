"""The time before the kernels stays near that of an empty autograd function."""

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

# Of the empty function's time. A custom operator alone, without kernels, takes seven times it.
MOST = 2.0
# A read launches one kernel and allocates one tensor: what checks of a call take weighs more.
MOST_OF_READ = 2.5
ROUNDS = 20  # until one is quiet enough: other work on the machine only adds


def least(a: Cost, b: Cost) -> Cost:
    return a._replace(ours=min(a.ours, b.ours), empty=min(a.empty, b.empty))


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


@pytest.mark.parametrize("mechanism", ops.MECHANISMS)
def test_attention(mechanism: str) -> None:
    check(Subject, mechanism)


@pytest.mark.parametrize("mechanism", ["mala", "elu"])
@pytest.mark.parametrize("kind", [StateSubject, ReadSubject])
def test_states(kind: type[Subject], mechanism: str) -> None:
    check(kind, mechanism)
