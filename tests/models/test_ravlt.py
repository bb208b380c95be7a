"""RAVLT against the released code: weights, logits, attention, counts."""

from __future__ import annotations

import argparse

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests import golden
from vitlinear import ops
from vitlinear.checkpoints import checkpoint_filter_fn
from vitlinear.checkpoints.mappings import PYRAMID
from vitlinear.layers import GatedAttention

RELEASED = {
    "RAVLT_T": ("ravlt_t", 14_897_768),
    "RAVLT_S": ("ravlt_s", 25_591_208),
    "RAVLT_B": ("ravlt_b", 48_241_288),
    "RAVLT_L": ("ravlt_l", 95_242_440),
}


def released_weights(name: str) -> dict[str, torch.Tensor]:
    return golden.upstream_state_dict(golden.variants("rala")[name]["state_dict"])


@pytest.fixture(scope="module")
def ravlt_t():
    model = timm.create_model("ravlt_t").double().eval()
    model.load_state_dict(checkpoint_filter_fn(released_weights("RAVLT_T"), model))
    return model


@pytest.mark.parametrize("size", [(224, 224), (192, 256)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("backend", ["eager", "library"])
def test_golden_logits(ravlt_t, size, backend):
    for module in ravlt_t.modules():
        if isinstance(module, GatedAttention):
            module.backend = backend
    with torch.no_grad():
        logits = ravlt_t(golden.images(*size))[:, :64]
    assert golden.relative_error(logits, golden.logits("RAVLT_T", *size)) < 1e-6


def test_golden_logits_float32(ravlt_t):
    model = timm.create_model("ravlt_t").eval()
    model.load_state_dict(ravlt_t.state_dict())
    with torch.no_grad():
        logits = model(golden.images(224, 224).float())[:, :64]
    assert golden.relative_error(logits, golden.logits("RAVLT_T", 224, 224)) < 2e-6


@pytest.mark.parametrize("case, attn_type", [("rala_a", "rala"), ("rope_softmax_a", "softmax")])
@pytest.mark.parametrize("backend", ["eager", "library"])
def test_golden_attention(case, attn_type, backend):
    case = golden.attention_case(case)
    module = GatedAttention(case["C"], case["heads"], attn_type, backend=backend).double()
    ours = {f"stages.0.blocks.0.attn.{k}": v for k, v in module.state_dict().items()}
    theirs = {f"layers.0.blocks.0.attn.{k}": v for k, v in case["weights"].items()}
    converted = PYRAMID.convert(theirs, ours)
    module.load_state_dict({k.rpartition("attn.")[2]: v for k, v in converted.items()})
    x = case["x"].permute(0, 2, 3, 1).requires_grad_()
    rotary = ops.rotary_tables(case["H"], case["W"], module.head_dim, dtype=torch.float64)
    out = module(x, rotary)
    (grad,) = torch.autograd.grad(out, x, case["grad"].permute(0, 2, 3, 1))
    assert golden.relative_error(out.permute(0, 3, 1, 2), case["out"]) < 1e-6
    assert golden.relative_error(grad.permute(0, 3, 1, 2), case["grad_input"]) < 1e-6


@pytest.mark.parametrize("released", RELEASED)
def test_parameters_and_keys_of_every_variant(released):
    name, count = RELEASED[released]
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count
    assert golden.variants("rala")[released]["num_params"] == count
    entries = golden.variants("rala")[released]["state_dict"]
    weights = {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, shape, dtype in entries
    }
    converted = checkpoint_filter_fn(weights, model)
    assert {k: v.shape for k, v in converted.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


@pytest.mark.parametrize(
    "name, values",
    [
        ("ravlt_t", (1, 1, 1, 1)),
        ("ravlt_s", (1, 1, 1, 1)),
        ("ravlt_b", (1, 1, 1e-6, 1e-6)),
        ("ravlt_l", (1e-6, 1e-6, 1e-6, 1e-6)),
    ],
)
def test_initial_layer_scale(name, values):
    model = timm.create_model(name)
    for stage, value in zip(model.stages, values, strict=True):
        for block in stage.blocks:
            assert (block.ls1.gamma == value).all() and (block.ls2.gamma == value).all()


WRAPPED = {
    "bare": lambda weights: weights,
    "model": lambda weights: {"model": weights, "epoch": 3},
    "state_dict": lambda weights: {"state_dict": weights},
    "module prefix": lambda weights: {"model": {f"module.{k}": v for k, v in weights.items()}},
    "ema wins": lambda weights: {
        "model": {k: torch.zeros_like(v) for k, v in weights.items()},
        "model_ema": weights,
        "optimizer": {"state": {}, "param_groups": []},
        "args": argparse.Namespace(epochs=300, model="RAVLT_T"),
        "max_accuracy": 82.8,
    },
}


@pytest.mark.parametrize("form", WRAPPED)
def test_published_checkpoint_file(form, tmp_path, ravlt_t):
    """Any form the authors' training script writes loads with pretrained=True."""
    path = tmp_path / "RAVLT_T.pth"
    torch.save(WRAPPED[form](released_weights("RAVLT_T")), path)
    model = timm.create_model(
        "ravlt_t", pretrained=True, pretrained_cfg_overlay={"file": str(path)}
    )
    for (key, value), expected in zip(
        model.state_dict().items(), ravlt_t.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected.to(value.dtype)), key


def test_published_weights_adapt_to_other_heads_and_channels(tmp_path):
    path = tmp_path / "RAVLT_T.pth"
    torch.save({"model": released_weights("RAVLT_T")}, path)
    model = timm.create_model(
        "ravlt_t",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path)},
        num_classes=10,
        in_chans=1,
    )
    expected = golden.weight("patch_embed.proj.0.weight", [32, 3, 3, 3]).sum(1, keepdim=True)
    torch.testing.assert_close(model.stem.conv1.conv.weight.detach().double(), expected)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 10)


class Payload:
    """What unpickling would have to execute."""

    def __reduce__(self):
        return (print, ("executed",))


def test_checkpoint_that_needs_code_is_refused(tmp_path, capsys):
    path = tmp_path / "bad.pth"
    torch.save({"model": released_weights("RAVLT_T"), "extra": Payload()}, path)
    with pytest.raises(RuntimeError, match="weights_only=True blocked"):
        timm.create_model("ravlt_t", pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert "executed" not in capsys.readouterr().out


def test_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "RAVLT_S.pth"
    torch.save({"model": released_weights("RAVLT_S")}, path)
    with pytest.raises(RuntimeError, match=r"stages\.0\.blocks\.2"):
        timm.create_model("ravlt_t", pretrained=True, pretrained_cfg_overlay={"file": str(path)})


@pytest.mark.parametrize("letter", "tsbl")
def test_pretrained_cfg_is_complete(letter):
    cfg = timm.get_pretrained_cfg(f"ravlt_{letter}")
    assert cfg.hf_hub_id == "aldjalkdf/RAVLT"
    assert cfg.hf_hub_filename == f"RAVLT_{letter.upper()}.pth"
    assert cfg.license == "mit" and cfg.paper_ids == "arXiv:2411.07635"
    assert cfg.input_size == (3, 224, 224) and cfg.crop_pct == 0.875
    assert cfg.tag == "in1k"
    assert timm.is_model_pretrained(f"ravlt_{letter}")
    assert not timm.is_model_pretrained(f"ravlt_{letter}_linear")


@pytest.mark.parametrize(
    "name, projections, attention",
    [
        ("ravlt_t", 2.412, 0.201),
        ("ravlt_s", 4.506, 0.372),
        ("ravlt_b", 9.802, 0.778),
        ("ravlt_l", 16.092, 1.117),
    ],
)
@pytest.mark.parametrize("backend", ["eager", "library"])
def test_multiply_adds_of_released_code(name, projections, attention, backend):
    """Giga multiply-adds at 224 x 224, as counted on the authors' models."""
    model = timm.create_model(name, device="meta", attn_backend=backend).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(projections + attention, rel=0.01)


def test_linear_sibling_has_no_softmax():
    published = timm.create_model("ravlt_t", device="meta")
    linear = timm.create_model("ravlt_t_linear", device="meta")
    types = {
        name: [m.attn_type for m in model.modules() if isinstance(m, GatedAttention)]
        for name, model in (("published", published), ("linear", linear))
    }
    assert types["published"] == ["rala"] * 4 + ["softmax"] * 8
    assert types["linear"] == ["rala"] * 12
    assert published.state_dict().keys() == linear.state_dict().keys()
