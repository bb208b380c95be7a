"""timm's own test suite, unmodified, on our models: a few of them in each test here.

``VITLINEAR_PEER_MODELS`` chooses the models: names or wildcards, comma separated, or ``all``; by
default the ``test_*`` ones, which exist so that this is quick. Those take turns with a few costly
tests (``timm_peer.IN_TURN``), except in nightly runs. What ran inside is listed at the end of
pytest's output, a line for each model.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import vitlinear  # noqa: F401  (registers the models that are listed below)
from tests.peer import suite as peer
from tests.peer import timm_peer
from tests.selection import PEER_RESULT

pytestmark = pytest.mark.network

MODELS = timm_peer.our_models()
# In one process, which takes as long to start and to collect as the tests of a model do.
TOGETHER = 8
# They run the code of the models that they are siblings of: by night, unless they are asked for.
SIBLINGS = [
    name
    for name in MODELS
    if name.endswith("_linear") and not os.environ.get("VITLINEAR_PEER_MODELS")
]
FIRST = [name for name in MODELS if name not in SIBLINGS]
GROUPS = [
    pytest.param(models[i : i + TOGETHER], id=",".join(models[i : i + TOGETHER]), marks=marks)
    for models, marks in ((FIRST, ()), (SIBLINGS, pytest.mark.nightly))
    for i in range(0, len(models), TOGETHER)
]
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
    """One line: how many tests of each outcome, and their names without the common prefix."""
    parts = [
        f"{len(results)} {kind} ({', '.join(sorted(r['test'][len('test_') :] for r in results))})"
        for kind, results in run.outcomes(model).items()
        if results
    ]
    return f"{model}, timm {run.report['timm']}: {'; '.join(parts) or 'nothing ran'}"


def check(run: peer.PeerRun, model: str, required: frozenset[str]) -> None:
    """Asserts that every required test ran on the model and that nothing failed or was skipped."""
    outcomes = run.outcomes(model)
    failures = "\n".join(f"  {r['test']}: {r['detail']}" for r in outcomes["failed"])
    if failures:
        raise AssertionError(f"{model} breaks timm's contract:\n{failures}")
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


def test_the_selection_names_models() -> None:
    assert MODELS, "VITLINEAR_PEER_MODELS matches no model of ours"


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("models", GROUPS)
def test_timm_suite(
    models: list[str],
    suite: Path,
    record_property: Callable[[str, object], None],
    pytestconfig: pytest.Config,
) -> None:
    in_turn = not (pytestconfig.getoption("nightly") or os.environ.get("VITLINEAR_PEER_MODELS"))
    run = peer.run_suite(suite, ",".join(models), in_turn=in_turn)
    for model in models:
        record_property(PEER_RESULT, summarise(run, model))
    print(run.output)
    left_out = timm_peer.left_out(models) if in_turn else frozenset()
    for model in models:
        required = timm_peer.required_tests(model in run.report["token_models"])
        check(run, model, required - {test for test, name in left_out if name == model})
    assert run.exit_status == 0


# Of timm's models with replaced attentions, in groups as above.
REPLACED = [
    ["test_replaced_vit", "test_replaced_vit_gated", "test_replaced_deit", "test_replaced_deit3"],
    ["test_replaced_dinov2", "test_replaced_clip", "test_replaced_siglip", "test_replaced_hybrid"],
    ["test_replaced_eva02", "test_replaced_rope", "test_replaced_sapiens2", "test_replaced_beit"],
    [
        "test_replaced_relpos",
        "test_replaced_naflexvit",
        "test_replaced_dinov3",
        "test_replaced_swin",
    ],
]


@pytest.mark.nightly
@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "models",
    REPLACED,
    ids=",".join,
)
def test_models_with_replaced_attentions(models: list[str], suite: Path) -> None:
    run = peer.run_suite(suite, ",".join(models), package="replacedzoo")
    print(run.output)
    for model in models:
        required = timm_peer.required_tests(model in run.report["token_models"])
        if "naflexvit" in model:  # timm does not compile it with TorchScript
            required = frozenset(name for name in required if "torchscript" not in name)
        check(run, model, required)
    assert run.exit_status == 0


class TestHarness:
    """The harness itself: it passes what is right, and sees what is wrong or missing."""

    @pytest.mark.nightly
    @pytest.mark.slow
    @pytest.mark.process
    def test_tells_a_right_model_from_a_wrong_one(self, suite: Path) -> None:
        right, wrong = "test_toy_pyramid", "toy_sloppy"
        run = peer.run_suite(suite, f"{right},{wrong}", package="toyzoo")
        check(run, right, timm_peer.required_tests(right in run.report["token_models"]))
        assert {result["test"] for result in run.outcomes(wrong)["failed"]} == {
            "test_model_default_cfgs",  # the swallowed argument
            "test_prune_intermediate_layers_contract",  # the head that stays behind
            "test_prune_intermediate_layers_params_used",
        }
        with pytest.raises(AssertionError, match="toy_sloppy breaks timm's contract"):
            check(run, wrong, timm_peer.required_tests(wrong in run.report["token_models"]))
        assert run.exit_status == 1

    @pytest.mark.parametrize(
        ("results", "unknown", "complaint"),
        [
            ([], [], "did not run"),
            (["skipped"], [], "skipped without a reason"),
            (["passed"], ["test_new_in_timm"], "does not know"),
        ],
    )
    def test_passes_nothing_over_in_silence(
        self, results: list[str], unknown: list[str], complaint: str
    ) -> None:
        name, model = "test_model_forward", "test_x"
        report = {
            "timm": "0",
            "results": [
                {"test": name, "model": model, "outcome": outcome, "detail": ""}
                for outcome in results
            ],
            "unknown": unknown,
        }
        with pytest.raises(AssertionError, match=complaint):
            check(peer.PeerRun(report, "", 0), model, frozenset({name}))

    @pytest.mark.parametrize("models", [group.values[0] for group in GROUPS if not group.marks])
    def test_models_take_turns(self, models: list[str]) -> None:
        """Each lacks one test of every pair, and another model of its run has that."""
        left_out = timm_peer.left_out(models)
        for pair in timm_peer.IN_TURN:
            lacking = [[model for model in models if (test, model) in left_out] for test in pair]
            assert sorted(sum(lacking, [])) == sorted(models)
            assert all(lacking) or len(models) == 1

    def test_lists_each_test_once(self) -> None:
        listed = [name for names in timm_peer.DESELECTED.values() for name in names]
        ran = timm_peer.CONTRACT | timm_peer.CONTRACT_TOKEN
        ran |= timm_peer.REPOINTED.keys() | timm_peer.REPOINTED_MAPS.keys()
        assert len(listed) == len(set(listed))
        assert not ran & set(listed)
        assert {test for pair in timm_peer.IN_TURN for test in pair} <= (
            timm_peer.required_tests(tokens=True) & timm_peer.required_tests(tokens=False)
        )
