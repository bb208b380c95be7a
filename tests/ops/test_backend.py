"""The choice of a backend where there is no GPU; nothing loads Triton unasked."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch

import vitlinear
from tests.ops.inputs import attend, make_inputs
from vitlinear import ops
from vitlinear.ops import backend

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
def test_auto_follows_measurements(monkeypatch):
    monkeypatch.setattr(backend, "_has_triton", True)
    monkeypatch.setattr(backend, "_failure", None)
    assert backend._measured == (), "then benchmarks/README.md must show them"
    choice = ops.choose_backend("auto", WORKLOAD)
    assert choice == ("eager", "auto: kernels not yet measured for this call")
    rows = [
        backend.Measurement("a GPU", "rala", "bfloat16", 64, length, speedup)
        for length, speedup in ((49, 0.5), (784, 3.0))
    ]
    monkeypatch.setattr(backend, "_measured", tuple(rows))
    choice = ops.choose_backend("auto", WORKLOAD)
    assert choice.backend == "triton"
    assert choice.reason == "auto: kernels measured 3 times the speed of eager at N = 784 on a GPU"
    assert ops.choose_backend("auto", WORKLOAD._replace(length=196)).backend == "eager"
    assert ops.choose_backend("auto", WORKLOAD._replace(length=16)).backend == "eager"
    assert ops.choose_backend("auto", WORKLOAD._replace(head_dim=32)).backend == "eager"
    assert ops.choose_backend("auto", WORKLOAD._replace(device="cpu")).backend == "eager"
    assert ops.choose_backend("eager", WORKLOAD).backend == "eager"


def test_report_names_the_obstacle(monkeypatch):
    monkeypatch.setattr(backend, "_has_triton", True)
    model = timm.create_model("test_ravlt_linear", attn_backend="triton")
    for row in vitlinear.backend_report(model):
        assert row.backend == "none" and "needs a GPU" in row.reason


@pytest.mark.process
def test_kernels_are_loaded_only_when_they_run():
    """By nothing in the package but what the operator imports when it is to run them."""
    code = (
        "import sys, timm, torch; before = set(sys.modules); import vitlinear; "
        "from vitlinear import ops; x = torch.randn(1, 4, 1, 8, requires_grad=True); "
        "[ops.linear_attention(x, x, x, backend=b).sum().backward() for b in ('auto', 'library')]; "
        "loaded = set(sys.modules) - before; "
        "print([m for m in loaded if 'triton' in m.split('.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
