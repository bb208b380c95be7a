"""Findings about the kernels are kept between processes, or cost one warning."""

from __future__ import annotations

import json
import multiprocessing
import warnings
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from vitlinear.ops import kernel_cache
from vitlinear.ops.gpu import Gpu
from vitlinear.ops.measurements import Measurement

GPU = Gpu("Some GPU 80GB/PCIe", "sm_90", (9, 0), "580.1", "3.6.0")
ROW = Measurement("mala", "bfloat16", 64, ("rotary", "gate"), True, 64, 196, 4, 1.0, 2.0, 1.5)


@pytest.fixture(autouse=True)
def empty(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kernel_cache.forget()
    yield
    kernel_cache.forget()


def keep(**checks: str) -> Path | None:
    return kernel_cache.add(GPU, lambda known: known.checks.update(checks))


def test_what_is_added_is_read():
    path = keep(a="", b="too wrong")
    assert path == kernel_cache.path_for(GPU)
    assert path.name == (
        f"Some-GPU-80GB-PCIe_driver-580.1_triton-3.6.0_{kernel_cache.sources_hash()}.json"
    )
    kernel_cache.add(GPU, lambda known: known.rows.append(ROW))
    kernel_cache.add(GPU, lambda known: known.blocks.update(k=[64, 8, 3, 0]))
    kernel_cache.forget()
    found = kernel_cache.known(GPU)
    assert found.checks == {"a": "", "b": "too wrong"}
    assert found.rows == [ROW] and found.blocks == {"k": [64, 8, 3, 0]}
    assert kernel_cache.known(GPU._replace(driver="581")).checks == {}
    assert [each.suffix for each in sorted(path.parent.iterdir())] == [".json", ".lock"]


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"{", "Expecting property name"),
        (b"\xff\xfe", "can't decode"),
        (b"[]", "list indices"),
        (b'{"format": 99}', "format 99, not 1"),
        (b'{"format": 1, "checks": {}, "rows": []}', "no 'blocks'"),
        (b'{"format": 1, "checks": {}, "rows": [{}], "blocks": {}}', "not a measurement"),
        (b'{"format": 1, "checks": {}, "rows": [], "blocks": {"k": [1, "2", 3]}}', "four numbers"),
    ],
)
def test_a_damaged_file_costs_one_warning(content, reason):
    path = kernel_cache.path_for(GPU)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=reason) as caught:
        assert kernel_cache.known(GPU).checks == {}
        keep(a="")
    assert len(caught) == 1
    kernel_cache.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel_cache.known(GPU).checks == {"a": ""}


@pytest.mark.parametrize("time", [0, -1.0, float("nan"), float("inf")])
def test_times_that_nothing_takes(time):
    with pytest.raises(ValueError, match="times that are not above 0"):
        Measurement.of({**ROW._asdict(), "triton_ms": time})


def test_a_folder_that_cannot_be_written_costs_one_warning(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be kept: .*Not a directory.*XDG_CACHE") as caught:
        assert keep(a="") is None
        assert keep(b="") is None
    assert len(caught) == 1
    assert kernel_cache.known(GPU).checks == {"a": "", "b": ""}, "in this process it is known"


def keep_twenty(name: str, start: Event) -> None:
    """Runs in a process of its own, when all of them are there."""
    start.wait()
    for i in range(20):
        keep(**{f"{name}-{i}": ""})


@pytest.mark.process
def test_processes_do_not_lose_what_others_add():
    """Forked: they have nothing but the file in common, as ones that were started have."""
    context = multiprocessing.get_context("fork")
    start = context.Event()
    running = [context.Process(target=keep_twenty, args=(name, start)) for name in "abc"]
    for process in running:
        process.start()
    start.set()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0, 0]
    content = json.loads(kernel_cache.path_for(GPU).read_text())
    assert sorted(content["checks"]) == sorted(f"{name}-{i}" for name in "abc" for i in range(20))
