"""InLine-DeiT against the released code: weights, logits, attention, counts, positions."""

from __future__ import annotations

import pytest
import timm
import torch

from tests import golden
from tests.pairwise import pairwise
from vitlinear.checkpoints import checkpoint_filter_fn
from vitlinear.layers.attention.inline_attention import InjectiveAttention, InLineTokenAttention
from vitlinear.report import backend_report

RELEASED = {
    "inline_deit_tiny": 6_477_736,
    "inline_deit_small": 16_734_760,
    "inline_deit_base": 23_797_096,
}


@pytest.fixture(scope="module")
def released_weights() -> dict[str, torch.Tensor]:
    return golden.upstream_state_dict(golden.variants("inline")["inline_deit_tiny"]["state_dict"])


@pytest.fixture(scope="module")
def inline_deit_tiny(released_weights):
    return golden.loaded("inline_deit_tiny", released_weights)


@pytest.mark.parametrize("backend", ["eager", "library"])
def test_golden_logits(inline_deit_tiny, backend):
    for module in inline_deit_tiny.modules():
        if isinstance(module, InjectiveAttention):
            module.backend = backend
    with torch.no_grad():
        logits = inline_deit_tiny(golden.images(224, 224))[:, :64]
    expected = golden.logits("inline_deit_tiny", 224, 224)
    assert golden.relative_error(logits, expected) < 1e-12


@pytest.mark.parametrize("backend", ["eager", "library"])
def test_golden_attention(backend):
    case = golden.attention_case("inline_a")
    module = InLineTokenAttention(case["C"], case["heads"], backend=backend).double()
    weights = case["weights"]
    ours = {
        "qkv": [torch.cat([weights[f"{x}.{p}"] for x in ("q", "kv")]) for p in ("weight", "bias")],
        "proj": [weights["proj.weight"], weights["proj.bias"]],
        "attend.local.fc1": [weights["residual.0.weight"], weights["residual.0.bias"]],
        "attend.local.fc2": [weights["residual.2.weight"], weights["residual.2.bias"]],
    }
    module.load_state_dict(
        {
            f"{key}.{p}": v
            for key, pair in ours.items()
            for p, v in zip(("weight", "bias"), pair, strict=True)
        }
    )
    x = case["x"].requires_grad_()
    out = module(x, case["H"], case["W"])
    (grad,) = torch.autograd.grad(out, x, case["grad"])
    assert golden.relative_error(out, case["out"]) < 1e-12
    assert golden.relative_error(grad, case["grad_input"]) < 1e-12


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_and_keys_of_every_variant(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == RELEASED[name]
    assert golden.variants("inline")[name]["num_params"] == RELEASED[name]
    weights = {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, shape, dtype in golden.variants("inline")[name]["state_dict"]
    }
    converted = checkpoint_filter_fn(weights, model)
    assert {k: v.shape for k, v in converted.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


# Giga multiply-adds of convolutions and linear layers and of attention, at an image's side.
COUNTED = {
    "inline_deit_tiny": (224, 1.080, 0.030),
    "inline_deit_small": (288, 4.885, 0.081),
    "inline_deit_base": (448, 16.934, 0.235),
}


@pairwise(every=2, name=COUNTED, backend=["eager", "library"])
def test_multiply_adds_of_released_code(name, backend):
    size, projections, attention = COUNTED[name]
    counted = golden.giga_multiply_adds(name, size, attn_backend=backend)
    assert counted == pytest.approx(projections + attention, rel=0.01)


def test_published_checkpoint_file(tmp_path, inline_deit_tiny, released_weights):
    path = tmp_path / "inline.pth"
    torch.save({"model": released_weights}, path)
    overlay = {"file": str(path)}
    model = timm.create_model("inline_deit_tiny", pretrained=True, pretrained_cfg_overlay=overlay)
    for (key, value), expected in zip(
        model.state_dict().items(), inline_deit_tiny.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected.to(value.dtype)), key
    larger = timm.create_model(
        "inline_deit_tiny", pretrained=True, pretrained_cfg_overlay=overlay, img_size=(256, 320)
    )
    assert larger.pos_embed.shape == (1, 1 + 16 * 20, 192)
    x = torch.randn(1, 3, 256, 320)
    torch.testing.assert_close(larger.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, size", [("tiny", 224), ("small", 288), ("base", 448)])
def test_pretrained_cfg(name, size):
    cfg = timm.get_pretrained_cfg(f"inline_deit_{name}")
    assert cfg.input_size == (3, size, size) and cfg.crop_mode == "squash"
    assert cfg.paper_ids == "arXiv:2412.06590" and cfg.tag == "in1k"
    model = timm.create_model(f"inline_deit_{name}", device="meta")
    assert model.patch_embed.grid_size == (size // 16, size // 16)


def test_backend_report():
    model = timm.create_model("test_inline_deit", attn_backend="library")
    report = backend_report(model, (2, 3, 96, 64))
    assert [row.attn_type for row in report] == ["inline"] * 4
    assert report[0].shape == (2, 1 + 24, 2, 32) and report[0].backend == "library"
