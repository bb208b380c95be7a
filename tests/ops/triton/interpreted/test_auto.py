"""The backend `auto` on a stand-in for a GPU: checked, wrong, slow, too small, out of memory."""

from __future__ import annotations

import json
import warnings

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops.inputs import Inputs, make_inputs
from tests.ops.triton.stand_in import StandIn, install, out_of_memory, out_of_resources
from vitlinear import ops
from vitlinear.ops import attention, backend, gpu, kernel_cache, self_check
from vitlinear.ops.terms import Terms
from vitlinear.report import attention_calls
from vitlinear.tune.calls import of_mechanism

DIM = 8


@pytest.fixture
def device(monkeypatch, tmp_path):
    yield install(monkeypatch, tmp_path)
    backend.forget()


def attend(inputs: Inputs, mechanism: str = "mala", **options) -> torch.Tensor:
    """A call without gradients on the backend that `auto` takes."""
    with torch.no_grad():
        q, k, v, _ = inputs.projection.unbind(2)
        return ops.linear_attention(q, k, v, mechanism=mechanism, **options)


def call(tokens: int = 8) -> Inputs:
    """Two samples and two heads of 4 x `tokens` / 4 tokens."""
    return make_inputs(grid=(4, tokens // 4), dim=DIM, dtype=torch.float32, rotary=False)


def work(mechanism: str = "mala", length: int = 32, training: bool = False) -> ops.Workload:
    given = (False,) * len(Terms._fields)
    return ops.Workload("cpu", torch.float32, length, DIM, mechanism, 2, 2, None, given, training)


def choice(**which) -> ops.Choice:
    """The choice of `auto`, without a check."""
    return ops.choose_backend("auto", work(**which), may_check=False)


def test_a_kind_of_call_is_checked_once(device, monkeypatch):
    checked = []
    check = self_check.failure
    monkeypatch.setattr(
        self_check, "failure", lambda kind: checked.append(kind.label) or check(kind)
    )
    attend(call(8))
    assert not device.launched, "too few tokens: nothing to check"
    assert choice() == (
        "triton",
        "auto: not measured; from 64 tokens of all heads on; to be checked at the first call",
    )
    for _ in range(2):
        attend(call(32))
    assert checked == ["mala float32 8 plain inference"]
    assert device.launched == ["forward_kernel"] * 3
    assert choice() == ("triton", "auto: not measured; from 64 tokens of all heads on")
    # another process reads the verdict
    backend.forget()
    attend(call(32))
    assert len(checked) == 1 and len(device.launched) == 4
    monkeypatch.setattr(backend, "_check_from_environment", "always")
    backend.forget()
    attend(call(32))
    assert len(checked) == 2
    monkeypatch.setattr(backend, "_check_from_environment", "0")
    backend.forget()
    device.wrong.add("magnitude-aware")
    exact = attend(call(32), backend="eager")
    torch.testing.assert_close(attend(call(32)), 1.01 * exact)
    assert len(checked) == 2


def test_states_are_checked_as_their_attention(device):
    def two_steps(tokens):
        q, k, v, _ = call(tokens).projection.detach().unbind(2)
        state = ops.linear_attention_state(k, v, mechanism="mala")
        return ops.read_linear_attention_state(q, state, mechanism="mala")

    two_steps(8)
    assert not device.launched, "too few tokens"
    out = two_steps(32)
    assert device.launched == ["forward_kernel", "state_kernel", "read_kernel"]
    torch.testing.assert_close(out, attend(call(32), backend="eager"))
    device.wrong.add("magnitude-aware")
    backend.forget()
    kernel_cache.add(device.gpu, lambda known: known.checks.clear())
    del device.launched[:]
    with pytest.warns(UserWarning, match="mala float32 8 plain inference failed their check"):
        torch.testing.assert_close(two_steps(32), out)
    assert device.launched == ["forward_kernel"]


def test_a_check_in_training_is_one_of_inference_too(device):
    inputs = call(32)
    q, k, v, _ = inputs.projection.unbind(2)
    ops.linear_attention(q, k, v, mechanism="elu").sum().backward()
    assert "backward_kernel" in device.launched
    del device.launched[:]
    attend(inputs, "elu")
    assert device.launched == ["forward_kernel"]


def test_a_wrong_mechanism_runs_the_formula_and_no_other_does(device):
    device.wrong.add(ops.get_mechanism("mala").read_out)
    inputs = call(32)
    exact = attend(inputs, backend="eager")
    told = r"the GPU kernels of mala float32 8 plain inference failed their check on Stand-in 1, "
    told += r"the formula runs instead: error of the output 1\.0e-02 at 15 tokens, allowed"
    with pytest.warns(UserWarning, match=told) as caught:
        out = attend(inputs)
    assert len(caught) == 1 and torch.equal(out, exact)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(attend(inputs), exact)
        attend(inputs, "elu")
    assert choice().backend == "eager" and "error of the output" in choice().reason
    assert choice(mechanism="elu").backend == "triton"
    # another process says so too, without a check of its own
    backend.forget()
    del device.launched[:]
    with pytest.warns(UserWarning, match="failed their check"):
        assert torch.equal(attend(inputs), exact)
    assert not device.launched


@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_kernel"])
def test_too_few_resources(device, kernel):
    device.failing[kernel] = out_of_resources()
    inputs = call(32)
    q, k, v, _ = inputs.projection.unbind(2)
    with pytest.warns(UserWarning, match="failed their check.*OutOfResources") as caught:
        ops.linear_attention(q, k, v, mechanism="mala").sum().backward()
    assert len(caught) == 1 and "backward_kernel" not in device.launched
    assert choice(training=True).backend == "eager"
    assert choice(mechanism="elu", training=True).backend == "triton"


def test_no_memory_is_nothing_against_the_kernels(device):
    device.failing["forward_kernel"] = out_of_memory()
    with pytest.warns(UserWarning, match="no memory to check the GPU kernels") as caught:
        attend(call(32))
        attend(call(32))
    assert len(caught) == 1
    assert choice() == ("eager", "auto: no memory for the check of the kernels")
    assert not kernel_cache.path_for(device.gpu).exists()
    backend.forget()
    device.failing.clear()
    attend(call(32))
    assert choice().backend == "triton"
    # and once checked, it is the caller's to hear of it
    device.failing["forward_kernel"] = out_of_memory()
    with pytest.raises(torch.OutOfMemoryError):
        attend(call(32))
    assert choice().backend == "triton"


def test_a_later_failure_is_told_once_and_of_its_kind_alone(device):
    attend(call(32))
    attend(call(32), "elu")
    device.failing["forward_kernel"] = out_of_resources()
    with pytest.warns(UserWarning, match="failed for mala, torch.float32, head_dim 8") as caught:
        attend(call(32))
        attend(call(32))
    assert len(caught) == 1
    assert choice().backend == "eager" and choice(mechanism="elu").backend == "triton"


@pytest.mark.parametrize("reason", ["a capture", "no memory"])
def test_failures_that_pass(device, reason):
    """The formula runs that time, and the kernels the next time."""
    attend(call(32))
    text = {"a capture": "not permitted", "no memory": "Triton Error [CUDA]: out of memory"}[reason]
    device.failing["forward_kernel"] = RuntimeError(text)
    device.capturing = reason == "a capture"
    with pytest.warns(UserWarning, match=f"the formula runs this time, .*{reason[-7:]}"):
        attend(call(32))
    device.failing.clear()
    device.capturing = False
    del device.launched[:]
    attend(call(32))
    assert device.launched == ["forward_kernel"] and choice().backend == "triton"


def test_nothing_is_checked_while_calls_are_recorded(device):
    device.capturing = True
    attend(call(32))
    assert not device.launched
    device.capturing = False
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        attend(call(32))
    assert not device.launched
    attend(call(32))
    assert device.launched
    del device.launched[:]
    device.capturing = True
    attend(call(32))
    assert device.launched == ["forward_kernel"]


def test_transformed_calls_run_common_operators(device):
    q, k, v, _ = call(32).projection.detach().unbind(2)
    torch.vmap(lambda x: ops.linear_attention(x, k, v))(q[None])
    torch.func.jvp(lambda x: ops.linear_attention(x, k, v), (q,), (k,))
    assert not device.launched


@pytest.mark.compile
def test_compiled_programs_take_what_was_checked(device):
    inputs = call(32)

    def compiled() -> torch.Tensor:
        torch.compiler.reset()
        return torch.compile(attend, backend="aot_eager", fullgraph=True)(inputs)

    with pytest.warns(UserWarning, match="compiled programs run the formula for mala float32 8"):
        compiled()
    assert not device.launched
    attend(inputs)
    del device.launched[:]
    backend._rules.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="compiled programs")
        compiled()
    assert device.launched == ["forward_kernel"]


@pytest.mark.compile
def test_compiled_for_heads_of_any_width(device):
    torch.compiler.reset()
    run = torch.compile(ops.linear_attention, backend="eager", fullgraph=True, dynamic=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="compiled programs")
        for dim in (8, 12):
            q = torch.randn(1, 12, 2, dim)
            assert run(q, q, q).shape == q.shape


def test_tensors_of_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(gpu, "is_there", lambda: False)
    with FakeTensorMode():
        q = torch.empty(1, 20000, 2, 8, device="cuda")
        assert ops.linear_attention(q, q, q).device.type == "cuda"
    found = ops.choose_backend("auto", ops.Workload("cuda", torch.float32, 20000, 8, "mala"))
    assert found.backend == "eager" and "there is no GPU here" in found.reason


def test_what_a_mode_notes_has_common_operators_only(device):
    attend(call(32))
    assert choice().backend == "triton"
    with FakeTensorMode():  # as for a program of `make_fx`
        assert choice().backend == "eager"


def test_a_default_device_is_no_mode(device):
    """Which `torch.set_default_device` looks like."""
    attend(call(32))
    before = dict(attention._known)
    with torch.device("cpu"):
        inputs = call(36)
        attend(inputs)
    assert len(attention._known) == len(before) + 1


def test_where_the_kernels_are_not_for(device):
    for told, reason in (
        ({"capability": (7, 5), "name": "Old"}, "compute capability 8.0, and Old has 7.5"),
        ({"triton": "3.5.1"}, "need triton 3.6, and 3.5.1 is here"),
        ({"architecture": "gfx1100"}, "compiled for gfx90a, gfx942, and not tried on gfx1100"),
    ):
        device.gpu = device.gpu._replace(**told)
        backend.forget()
        assert choice().backend == "eager" and reason in choice().reason
        device.gpu = StandIn().gpu


ROW = {
    "mechanism": "mala", "dtype": "float32", "head_dim": DIM, "terms": [], "training": False,
    "batch": 2, "heads": 2,
}  # fmt: skip


def write_rows(device: StandIn, *rows: dict) -> None:
    from vitlinear.ops.measurements import Measurement

    found = [Measurement.of({**ROW, **row}) for row in rows]
    kernel_cache.add(device.gpu, lambda known: known.rows.extend(found))
    backend.forget()


def test_measured_here_wins_over_the_threshold(device):
    write_rows(
        device,
        {"length": 8, "triton_ms": 2.0, "eager_ms": 1.0, "compiled_ms": 0.5},
        {"length": 64, "triton_ms": 1.0, "eager_ms": 3.0, "compiled_ms": 0.5},
    )
    assert choice(length=64).backend == "triton"
    assert choice(length=64).reason.startswith(
        "auto: 3 times the speed of eager at 2 x 64 x 2, measured here"
    )
    assert choice(length=32) == (
        "eager",
        "auto: 0.5 times the speed of eager at 2 x 8 x 2, measured here",
    )
    assert choice(length=2).backend == "eager"
    assert choice(length=32, training=True).backend == "triton", "not measured"
    # what a compiled program would run instead is faster than either
    rule = backend._decide(work().kind, compiling=True)
    assert rule.choice(10**6).backend == "eager"


def test_seeds_count_for_their_own_gpu_alone(device, monkeypatch, tmp_path):
    from vitlinear.ops import measurements

    rows = [{**ROW, "length": 8, "triton_ms": 1.0, "eager_ms": 4.0, "compiled_ms": None}]
    content = {"gpu": device.gpu._asdict(), "rows": rows, "blocks": {}}
    (tmp_path / "one.json").write_text(json.dumps(content))
    monkeypatch.setattr(measurements, "SEEDS", tmp_path)
    measurements.seeds.cache_clear()
    assert choice(length=8).reason.startswith("auto: 4 times the speed of eager at 2 x 8 x 2, ship")
    device.gpu = device.gpu._replace(name="Another")
    backend.forget()
    assert choice(length=8).reason == "auto: not measured, and under 64 tokens of all heads"
    device.gpu = StandIn().gpu
    write_rows(device, {"length": 8, "triton_ms": 2.0, "eager_ms": 1.0})
    assert choice(length=8).backend == "eager"
    measurements.seeds.cache_clear()


def test_a_check_that_ran_into_something_else_is_not_kept(device, monkeypatch):
    """No compiler, or an error of the user's own work on the GPU: another process asks again."""

    def fails(kind):
        raise RuntimeError("CUDA error: device-side assert triggered")

    with monkeypatch.context() as patched:
        patched.setattr(self_check, "failure", fails)
        with pytest.warns(UserWarning, match="device-side assert triggered"):
            attend(call(32))
    assert kernel_cache.known(device.gpu).checks == {}
    assert "device-side assert" in choice().reason, "not again in this process"
    backend.forget()
    attend(call(32))
    assert kernel_cache.known(device.gpu).checks == {"mala float32 8 plain inference": ""}


@pytest.fixture
def precision():
    """PyTorch's setting of float32 products, as it is at the start afterwards."""
    yield torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "none"


def test_kernels_in_tf32_are_others(device, precision):
    attend(call(32))
    assert choice().backend == "triton"
    torch.set_float32_matmul_precision("high")
    tf32 = work()._replace(tf32=True)
    seen = []
    with backend.observed(seen.append):
        attend(call(32))
    assert seen == [tf32] and tf32.kind.label == "mala float32-tf32 8 plain inference"
    labels = set(kernel_cache.known(device.gpu).checks)
    assert labels == {"mala float32 8 plain inference", tf32.kind.label}, "checked on its own"
    write_rows(device, {"length": 8, "triton_ms": 2.0, "eager_ms": 1.0, "tf32": True})
    assert choice().backend == "triton"
    assert ops.choose_backend("auto", tf32, may_check=False).backend == "eager"


def test_a_report_has_the_kernels_of_the_model(device, precision):
    model = timm.create_model("test_ravlt_linear", attn_backend="eager").train()
    images = torch.randn(2, 3, 64, 64)
    for setting in ("highest", "high"):
        torch.set_float32_matmul_precision(setting)
        seen = []
        with backend.observed(seen.append):
            model(images)
        listed = [call.work for call in attention_calls(model, images.shape)]
        assert listed == seen, setting


def test_one_call_before_compiling_checks_what_is_compiled_later(device):
    kind = work().kind
    with pytest.warns(UserWarning, match="have not been checked"):
        rule = backend._rule_of_a_program(kind)
    assert rule.choice(64).backend == "eager"
    attend(call(32))
    assert backend._rule_of_a_program(kind).choice(64).backend == "triton"


@pytest.mark.parametrize("term", ["head_scale", "lepe", "gate"])
def test_a_term_alone_that_learns_is_training(device, term):
    """Its gradient is made by kernels that a check of inference does not run."""
    q, k, v, other = call(32).projection.detach().unbind(2)
    values = torch.ones(2) if term == "head_scale" else other.clone()
    ops.linear_attention(
        q, k, v, mechanism="mala", **{term: values.requires_grad_()}
    ).sum().backward()
    assert values.grad is not None
    (label,) = kernel_cache.known(device.gpu).checks
    assert label == f"mala float32 8 {term} training"


def test_environment_is_checked(monkeypatch, device):
    monkeypatch.setattr(backend, "_check_from_environment", "never")
    with pytest.raises(ValueError, match="unknown VITLINEAR_SELF_CHECK value 'never'; choose"):
        attend(call(32))


@pytest.mark.quick
def test_every_mechanism_passes():
    """With all terms, in the interpreter, where kernels multiply in float32."""
    grids, self_check.GRIDS = self_check.GRIDS, ((2, 3),)
    try:
        for mechanism in ops.MECHANISMS:
            terms = ("rotary", "key_padding_mask", "head_scale", "lepe", "gate")
            call = of_mechanism(mechanism, (1, 1, 1, DIM), torch.float32, terms)
            kind = call._replace(device="cpu", device_index=None, training=True).kind
            assert self_check.failure(kind) is None, mechanism
    finally:
        self_check.GRIDS = grids


def test_real_devices_are_described(monkeypatch):
    """With what PyTorch tells of a GPU."""
    from types import SimpleNamespace

    told = SimpleNamespace(name="A GPU", major=8, minor=6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: told)
    found = gpu.describe(3)
    gpu.describe.cache_clear()
    assert found[:3] == ("A GPU", "sm_86", (8, 6)) and found.triton == gpu.triton_version() != ""
    assert gpu.obstacle(found) is None
