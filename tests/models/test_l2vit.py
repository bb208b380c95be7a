"""L2ViT against the released code: weights, logits, attention, counts."""

from __future__ import annotations

import pytest
import timm
import torch

from tests import golden
from tests.pairwise import diagonal, pairwise
from vitlinear.checkpoints import checkpoint_filter_fn
from vitlinear.layers import LinearAttention, PaddedWindowAttention
from vitlinear.report import backend_report

RELEASED = {
    "L2ViT_Tiny": ("l2vit_tiny", 28_596_781),
    "L2ViT_Small": ("l2vit_small", 50_199_157),
    "L2ViT_Base": ("l2vit_base", 88_577_188),
    "L2ViT_Base_384": ("l2vit_base_384", 88_577_188),
}


@pytest.fixture(scope="module")
def released_weights() -> dict[str, torch.Tensor]:
    return golden.upstream_state_dict(golden.variants("l2vit")["L2ViT_Tiny"]["state_dict"])


@pytest.fixture(scope="module")
def l2vit_tiny(released_weights):
    return golden.loaded("l2vit_tiny", released_weights)


@diagonal(backend=golden.BACKENDS, size=golden.SIZES)
def test_golden_logits(l2vit_tiny, size, backend):
    for module in l2vit_tiny.modules():
        if isinstance(module, LinearAttention):
            module.backend = backend
    with torch.no_grad():
        logits = l2vit_tiny(golden.images(*size)[:1])[:, :64]
    assert golden.relative_error(logits, golden.logits("L2ViT_Tiny", *size)[:1]) < 1e-12


@pytest.mark.parametrize("backend", ["eager", "library"])
def test_golden_attention(backend):
    case = golden.attention_case("l2_a")
    module = LinearAttention(case["C"], case["heads"], "l2", True, backend=backend).double()
    weights = case["weights"]
    module.load_state_dict({**weights, "temperature": weights["temperature"].flatten()})
    x = case["x"].requires_grad_()
    out = module(x)
    (grad,) = torch.autograd.grad(out, x, case["grad"])
    assert golden.relative_error(out, case["out"]) < 1e-12
    assert golden.relative_error(grad, case["grad_input"]) < 1e-12


@pytest.mark.parametrize("released", RELEASED)
def test_parameters_and_keys_of_every_variant(released):
    name, count = RELEASED[released]
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count
    assert golden.variants("l2vit")[released]["num_params"] == count
    weights = {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, shape, dtype in golden.variants("l2vit")[released]["state_dict"]
    }
    converted = checkpoint_filter_fn(weights, model)
    assert {k: v.shape for k, v in converted.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


def test_published_checkpoint_file(tmp_path, l2vit_tiny, released_weights):
    path = tmp_path / "L2ViT.pth"
    torch.save({"model": released_weights, "epoch": 299}, path)
    model = timm.create_model(
        "l2vit_tiny", pretrained=True, pretrained_cfg_overlay={"file": str(path)}
    )
    for (key, value), expected in zip(
        model.state_dict().items(), l2vit_tiny.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected.to(value.dtype)), key


@pytest.mark.parametrize(
    "name, filename, classes, size, crop",
    [
        ("l2vit_tiny", "L2ViT-Tiny-checkpoint-best-ema.pth", 1000, 224, "center"),
        ("l2vit_small.in1k", "L2ViT-Small-checkpoint-best-ema.pth", 1000, 224, "center"),
        ("l2vit_base", "L2ViT-Base-checkpoint-best-ema.pth", 1000, 224, "center"),
        ("l2vit_base.in22k", "L2ViT-Base-22k-pretrain-checkpoint-best.pth", 21841, 224, "center"),
        (
            "l2vit_base.in22k_ft_in1k",
            "L2ViT-Base-22k21k-finetune-224-checkpoint-best.pth",
            1000,
            224,
            "center",
        ),
        (
            "l2vit_base_384",
            "L2ViT-Base-22k21k-finetune-384-checkpoint-best.pth",
            1000,
            384,
            "squash",
        ),
    ],
)
def test_pretrained_cfg(name, filename, classes, size, crop):
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.url.startswith("https://github.com/ChuanyangZheng/L2ViT/releases/download/v1.0/")
    assert cfg.url.endswith(f"/{filename}") and cfg.license == "mit"
    assert cfg.num_classes == classes and cfg.input_size == (3, size, size)
    assert (cfg.crop_mode or "center") == crop and cfg.paper_ids == "arXiv:2501.16182"


# Giga multiply-adds of convolutions and linear layers and of attention, at an image's side.
COUNTED = {
    "l2vit_tiny": (224, 4.572, 0.117),
    "l2vit_small": (224, 8.790, 0.190),
    "l2vit_base": (224, 15.554, 0.254),
    "l2vit_base_384": (384, 45.708, 1.614),
}


@pairwise(every=2, name=COUNTED, backend=["eager", "library"])
def test_multiply_adds_of_released_code(name, backend):
    size, projections, attention = COUNTED[name]
    counted = golden.giga_multiply_adds(name, size, attn_backend=backend)
    assert counted == pytest.approx(projections + attention, rel=0.01)


def test_blocks_alternate():
    model = timm.create_model("l2vit_base_384", device="meta")
    for stage in model.stages:
        for i, block in enumerate(stage.blocks):
            if i % 2:
                assert isinstance(block.attn, LinearAttention) and hasattr(block, "lcm")
            else:
                assert isinstance(block.attn, PaddedWindowAttention)
                assert block.attn.window_size == 12


def test_temperature_and_drop_path_at_first():
    model = timm.create_model("test_l2vit", drop_path_rate=0.2)
    attn = model.stages[1].blocks[1].attn
    assert torch.equal(attn.temperature.detach(), torch.full((2,), 16**-0.5))
    for block in model.stages[2].blocks[1::2]:
        assert block.drop_path3.drop_prob == block.drop_path1.drop_prob > 0


def test_downsampling_pads_odd_maps_after_the_norm():
    layer, x = timm.create_model("test_l2vit").stages[1].downsample, torch.randn(1, 16, 5, 4)
    torch.nn.init.normal_(layer.norm.bias)
    padded = torch.nn.functional.pad(layer.norm(x), (0, 0, 0, 1))
    torch.testing.assert_close(layer(x), layer.conv(padded))


def test_backend_report():
    model = timm.create_model("test_l2vit", attn_backend="library")
    report = backend_report(model, (2, 3, 96, 64))
    assert [row.attn_type for row in report] == ["softmax", "l2"] * 3 + ["softmax"] * 2 + ["l2"]
    assert report[0].shape == (2 * 4 * 3, 49, 1, 16) and report[0].backend == "eager"
    assert report[1].shape == (2, 24 * 16, 1, 16) and report[1].backend == "library"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_batch_norms_count_a_batch_once(reentrant):
    """Backward runs their blocks a second time."""
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("test_l2vit", depths=(2, 1, 1, 1)).train()
        model.set_grad_checkpointing(checkpointing)
        timm.layers.set_reentrant_ckpt(reentrant)
        try:
            images = torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64).requires_grad_()
            model(images).square().sum().backward()
        finally:
            timm.layers.set_reentrant_ckpt(False)
        found.append(dict(model.named_buffers()) | {k: p.grad for k, p in model.named_parameters()})
    assert found[0]["stages.0.blocks.1.lcm.bn.num_batches_tracked"] == 1
    torch.testing.assert_close(found[1], found[0])
