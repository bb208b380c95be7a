"""When block sizes are measured, and when they depend on the call alone."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

import torch  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

from vitlinear.ops.triton import calls, kept, tuning  # noqa: E402
from vitlinear.ops.triton.plan import Plan  # noqa: E402
from vitlinear.ops.triton.tuning import Config  # noqa: E402

PLAN = Plan(
    "elu", "elu", "uniform", "divided", "none", True, False, 1, 64, 64, 64,
    has_mask=False, has_scale=False, has_lepe=False, has_gate=False, sums="bf16", reads="tf32",
)  # fmt: skip


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as `is_fixed` looks."""
    monkeypatch.setattr(tuning, "INTERPRETING", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(kept, "asked_for", "1")
    monkeypatch.setattr(tuning, "_chosen", {})
    # tests of the operators run with it on, for its poisoned memory
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)


def test_nothing_is_measured_unless_told_so(
    on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not tuning.is_fixed()
    with monkeypatch.context() as patch:
        patch.setattr(kept, "asked_for", "0")
        assert tuning.is_fixed()
    with monkeypatch.context() as patch:
        patch.setattr(kept, "asked_for", None)
        assert tuning.is_fixed()
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "INTERPRETING", True)
        assert tuning.is_fixed()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert tuning.is_fixed()
    assert not tuning.is_fixed()


def test_a_capture_takes_what_was_measured(on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *_ = tuning.candidates(PLAN)
    launched: list[Config] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(tuning, "do_bench", lambda call, **_: pytest.fail("measured"))
    tuning.run("a", PLAN, launched.append)
    assert launched == [first]
    tuning._chosen["a"] = second
    tuning.run("a", PLAN, launched.append)
    assert launched == [first, second]


def test_no_memory_to_measure_with(on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Config] = []

    def fails(call: Callable[[], None], **_: object) -> float:
        raise torch.OutOfMemoryError("tried to allocate 256 MiB")

    monkeypatch.setattr(tuning, "do_bench", fails)
    tuning.run("a", PLAN, launched.append)
    tuning.run("a", PLAN, launched.append)
    assert launched == [tuning.candidates(PLAN)[0]] * 3  # before the measurement, after it, again


def test_the_fastest_is_measured_once_for_a_key(
    on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, *_ = tuning.candidates(PLAN)
    launched: list[Config] = []

    def timed(call: Callable[[], None], **_: object) -> float:
        before = len(launched)
        call()
        return 1.0 if launched[before] == second else 2.0

    monkeypatch.setattr(tuning, "do_bench", timed)
    tuning.run("a", PLAN, launched.append)
    assert set(launched) == set(tuning.candidates(PLAN)) and launched[-1] == second
    launched.clear()
    tuning.run("a", PLAN, launched.append)
    assert launched == [second]
    # the same key where nothing is measured has a choice of its own
    monkeypatch.setattr(kept, "asked_for", "0")
    tuning.run("a", PLAN, launched.append)
    assert launched == [second, first]


def test_a_configuration_that_does_not_fit_gives_way_to_the_next(
    on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "asked_for", "0")
    configs = tuning.candidates(PLAN)
    launched: list[Config] = []

    def fits_last(config: Config) -> None:
        launched.append(config)
        if config != configs[-1]:
            raise OutOfResources(300_000, 227_000, "shared memory")

    tuning.run("b", PLAN, fits_last)
    tuning.run("b", PLAN, fits_last)
    assert launched == [*configs, configs[-1]]

    def never(config: Config) -> None:
        raise OutOfResources(300_000, 227_000, "shared memory")

    with pytest.raises(OutOfResources):
        tuning.run("c", PLAN, never)


def test_other_strides_that_do_not_fit_choose_anew(
    on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel is compiled anew for them, and may then take more memory."""
    monkeypatch.setattr(kept, "asked_for", "0")
    configs = tuning.candidates(PLAN)
    launched: list[tuple[Config, int]] = []

    class Kernel:
        __name__ = "kernel"

        def run(self, stride: int, plan: Plan, num_warps: int, num_stages: int, **_: Any) -> None:
            config = next(
                each
                for each in configs
                if (each.block_tokens, *each[1:3]) == (plan.block_tokens, num_warps, num_stages)
            )
            launched.append((config, stride))
            if stride == 7 and config == configs[0]:
                raise OutOfResources(300_000, 99_000, "shared memory")

    launch = calls.Launch(Kernel(), (1, 1), PLAN, ())
    for stride in (1, 1, 7, 1, 7):
        launch(True, stride)
    first, second = configs[:2]
    assert launched[:3] == [(first, 1), (first, 1), (first, 7)]
    assert launched[-3:] == [(second, 7), (second, 1), (second, 7)]
