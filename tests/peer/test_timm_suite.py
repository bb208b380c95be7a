"""timm's own test suite, unmodified, on our models: one test here per model.

``VITLINEAR_PEER_MODELS`` chooses the models: names or wildcards, comma separated, or ``all``; by
default the ``test_*`` ones, which exist so that this is quick. What ran inside is listed at the end
of pytest's output.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import vitlinear  # noqa: F401  (registers the models that are listed below)
from tests.peer import suite as peer
from tests.peer import timm_peer

pytestmark = pytest.mark.network

MODELS = timm_peer.our_models()
# timm's reason for passing over a model that takes one, large, input size only.
TOO_LARGE = "Fixed input size model > limit."


@pytest.fixture(scope="session")
def suite() -> Path:
    """timm's tests, from the cache or the package index; without either, a skip that says so."""
    try:
        return peer.fetch_suite()
    except peer.SuiteUnavailable as error:
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(f"timm's test suite must run in continuous integration: {error}")
        pytest.skip(f"timm's test suite is not within reach: {error}")


def summarise(run: peer.PeerRun, model: str) -> str:
    """One line: how many passed, and the name of each that did, without the common prefix."""
    outcomes = run.outcomes(model)
    counts = ", ".join(f"{len(results)} {kind}" for kind, results in outcomes.items() if results)
    passed = sorted(result["test"].removeprefix("test_") for result in outcomes["passed"])
    return f"{model} (timm {run.report['timm']}): {counts or 'nothing ran'}: {', '.join(passed)}"


def check(run: peer.PeerRun, model: str, required: frozenset[str]) -> None:
    """Asserts that every required test ran on the model and that nothing failed or was skipped."""
    outcomes = run.outcomes(model)
    failures = "\n".join(f"  {r['test']}: {r['detail']}" for r in outcomes["failed"])
    assert not failures, f"{model} breaks timm's contract:\n{failures}"
    skipped = {
        result["test"]
        for result in outcomes["skipped"]
        if model.startswith("test_") or TOO_LARGE not in result["detail"]
    }
    assert not skipped, f"{model}: skipped without a reason that we accept: {sorted(skipped)}"
    missing = required - {r["test"] for kind in outcomes.values() for r in kind}
    assert not missing, f"{model}: did not run {sorted(missing)}"
    assert not run.report["unknown"], (
        f"timm {run.report['timm']} has tests that timm_peer.py does not know: "
        f"{run.report['unknown']}; list each one there, to be run or with the reason why not"
    )
    assert run.exit_status == 0


def test_the_selection_names_models() -> None:
    assert MODELS, "VITLINEAR_PEER_MODELS matches no model of ours"


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", MODELS)
def test_timm_suite(
    model: str, suite: Path, record_property: Callable[[str, object], None]
) -> None:
    run = peer.run_suite(suite, model)
    record_property("peer_suite", summarise(run, model))
    print(run.output)
    check(run, model, timm_peer.required_tests(model))


class TestHarness:
    """The harness on two toy models: it passes what is right, and sees what is wrong."""

    def test_passes_a_model_that_keeps_the_contract(self, suite: Path) -> None:
        run = peer.run_suite(suite, "test_toy_pyramid", package="toyzoo")
        check(run, "test_toy_pyramid", timm_peer.required_tests("test_toy_pyramid"))

    def test_sees_a_model_that_breaks_it(self, suite: Path) -> None:
        run = peer.run_suite(suite, "toy_sloppy", package="toyzoo")
        failed = {result["test"] for result in run.outcomes("toy_sloppy")["failed"]}
        assert failed == {
            "test_model_default_cfgs",  # the swallowed argument
            "test_prune_intermediate_layers_contract",  # the head that stays behind
            "test_prune_intermediate_layers_params_used",
        }
        with pytest.raises(AssertionError, match="toy_sloppy breaks timm's contract"):
            check(run, "toy_sloppy", timm_peer.required_tests("toy_sloppy"))

    def test_misses_no_test_silently(self, suite: Path) -> None:
        run = peer.run_suite(suite, "no_such_model", package="toyzoo")
        with pytest.raises(AssertionError, match="did not run"):
            check(run, "no_such_model", timm_peer.required_tests("no_such_model"))

    def test_lists_each_test_once(self) -> None:
        listed = [name for names in timm_peer.DESELECTED.values() for name in names]
        ran = timm_peer.CONTRACT | timm_peer.CONTRACT_TOKEN
        ran |= timm_peer.REPOINTED.keys() | timm_peer.REPOINTED_MAPS.keys()
        assert len(listed) == len(set(listed))
        assert not ran & set(listed)
