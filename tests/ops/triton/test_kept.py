"""Block sizes that were measured are taken again, on the same GPU, by other processes."""

import pytest

pytest.importorskip("triton")

import torch  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

from tests.ops.triton.test_tuning import PLAN  # noqa: E402
from vitlinear.ops import gpu, kernel_cache  # noqa: E402
from vitlinear.ops.triton import kept, tuning  # noqa: E402
from vitlinear.ops.triton.tuning import Config  # noqa: E402

KEY = ("state_kernel", PLAN, torch.bfloat16, torch.device("cuda", 0), 5, ())


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch, tmp_path):
    here = [gpu.Gpu("a GPU", "sm_90", (9, 0), "1", "3.6.0")]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gpu, "describe", lambda index: here[0])
    monkeypatch.setattr(tuning, "INTERPRETING", False)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    monkeypatch.setattr(kept, "asked_for", None)
    kernel_cache.forget()
    yield here
    kernel_cache.forget()


def launched(fits=lambda config: True) -> list[Config]:
    """The configurations that a first call tries, in a process that knows nothing yet."""
    tried: list[Config] = []

    def call(config: Config) -> None:
        tried.append(config)
        if not fits(config):
            raise OutOfResources(300_000, 227_000, "shared memory")

    tuning._chosen.clear()
    tuning.run(KEY, PLAN, call)
    return tried


def test_measured_once_and_taken_from_then_on(on_a_gpu, monkeypatch):
    first, second, *_ = tuning.candidates(PLAN)
    times = iter([3.0, 1.0, *[2.0] * 10])
    monkeypatch.setattr(tuning, "do_bench", lambda run, **_: next(times))
    assert launched() == [first]
    with kept.measuring() as blocks:
        assert launched()[-1] == second
    assert kept.asked_for is None
    assert blocks == {kept.label(KEY): [*second]}
    kernel_cache.add(on_a_gpu[0], lambda known: known.blocks.update(blocks))
    kernel_cache.forget()
    assert launched() == [second]
    # what does not fit gives way, and 0 does without
    assert launched(lambda config: config != second) == [second, first]
    monkeypatch.setattr(kept, "asked_for", "0")
    assert launched() == [first]
    monkeypatch.setattr(kept, "asked_for", None)
    on_a_gpu[0] = on_a_gpu[0]._replace(name="another")
    assert launched() == [first]


def test_labels_tell_plans_apart_and_devices_not():
    assert kept.label(KEY) != kept.label((*KEY[:4], 6, ()))
    other = tuple(torch.device("cuda", 1) if part == KEY[3] else part for part in KEY)
    assert kept.label(KEY) == kept.label(other)
