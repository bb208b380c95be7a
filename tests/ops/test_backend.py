"""The choice of a backend where there is no GPU; nothing loads Triton unasked."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch

import vitlinear
from tests.ops.inputs import attend, make_inputs
from vitlinear import ops
from vitlinear.ops import backend, gpu, measurements, self_check

WORKLOAD = ops.Workload("cuda", torch.bfloat16, 3136, 64, "rala")


@pytest.mark.skipif(backend._interpreting, reason="the interpreter takes CPU tensors")
def test_kernels_refuse_what_they_cannot_run(monkeypatch):
    monkeypatch.setattr(backend, "_has_triton", True)
    with pytest.raises(ValueError, match="it needs a GPU, and the inputs are on 'cpu'"):
        attend("rala", make_inputs(dtype=torch.float32), "triton")
    with pytest.raises(ValueError, match="heads of up to 128 channels, not 256"):
        ops.choose_backend("triton", WORKLOAD._replace(head_dim=256))
    wide = WORKLOAD._replace(mechanism="nala", head_dim=128)
    assert ops.choose_backend("triton", wide).backend == "triton"
    assert ops.choose_backend("triton", wide._replace(dtype=torch.float16)).backend == "triton"
    monkeypatch.setattr(backend, "_from_environment", "triton")
    with pytest.raises(ValueError, match="set by VITLINEAR_BACKEND"):
        attend("rala", make_inputs(dtype=torch.float32), "auto")
    monkeypatch.setattr(backend, "_has_triton", False)
    with pytest.raises(ValueError, match="triton is not installed"):
        ops.choose_backend("triton", WORKLOAD)
    assert ops.choose_backend("triton", WORKLOAD._replace(dtype=torch.float64)).backend == "eager"


@pytest.mark.quick
def test_auto_without_measurements(monkeypatch, tmp_path):
    """The stand-in of interpreted/test_auto.py runs kernels; here the check alone is pretended."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(backend, "_has_triton", True)
    found = gpu.Gpu("a GPU", "sm_90", (9, 0), "1", "3.6.0")
    monkeypatch.setattr(gpu, "is_there", lambda: True)
    monkeypatch.setattr(gpu, "describe", lambda index: found)
    monkeypatch.setattr(self_check, "failure", lambda kind: None)
    backend.forget()
    assert not list(measurements.SEEDS.glob("*.json")), "then benchmarks/README.md must show them"
    small = WORKLOAD._replace(length=196, heads=4, batch=4)
    assert ops.choose_backend("auto", small) == (
        "eager",
        "auto: not measured, and under 16384 tokens of all heads",
    )
    assert ops.choose_backend("auto", small._replace(training=True)).backend == "eager"
    for work in (WORKLOAD._replace(batch=8), WORKLOAD._replace(batch=2, training=True)):
        assert ops.choose_backend("auto", work, may_check=False).reason.endswith("first call")
        assert ops.choose_backend("auto", work).backend == "triton"
        assert ops.choose_backend("eager", work).backend == "eager"
    assert ops.choose_backend("auto", WORKLOAD._replace(device="cpu")).backend == "eager"
    assert ops.choose_backend("auto", WORKLOAD._replace(head_dim=256)).backend == "eager"
    assert ops.choose_backend("auto", WORKLOAD._replace(dtype=torch.float64)).backend == "eager"
    backend.forget()


def test_report_names_the_obstacle(monkeypatch):
    monkeypatch.setattr(backend, "_has_triton", True)
    model = timm.create_model("test_ravlt_linear", attn_backend="triton")
    for row in vitlinear.backend_report(model):
        assert row.backend == "none" and "needs a GPU" in row.reason


@torch.no_grad()
def test_report_is_of_its_own_thread():
    model, other = (timm.create_model(f"test_{name}_linear").eval() for name in ("ravlt", "mavit"))
    expected = vitlinear.backend_report(model)

    def run_other(*_):
        with ThreadPoolExecutor(1) as threads:
            threads.submit(other, torch.zeros(1, 3, 32, 32)).result()

    with model.stem.register_forward_pre_hook(run_other):
        assert vitlinear.backend_report(model) == expected


def test_a_choice_is_not_settled_while_another_thread_observes():
    choice, seen = ops.Choice("triton", "a reason"), []
    with ThreadPoolExecutor(1) as threads, backend.observed(seen.append):
        assert not threads.submit(backend.is_settled, choice).result()
        threads.submit(ops.choose_backend, "eager", WORKLOAD).result()
        assert not seen
        ops.choose_backend("eager", WORKLOAD)
    assert seen == [WORKLOAD]
    assert backend.is_settled(choice)


@pytest.mark.process
def test_kernels_are_loaded_only_when_they_run(modules):
    """By nothing in the package but what the operator imports when it is to run them."""
    loaded = modules["attention"] - modules["timm"]
    assert "vitlinear.ops.registered" in loaded
    assert not [name for name in loaded if "triton" in name.split(".")]
