"""ViT³ and H-ViT³ against the released code: weights, logits, maps, counts."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
from torch import Tensor, nn

from tests import golden
from tests.pairwise import diagonal, some_by_night
from vitlinear.checkpoints import checkpoint_filter_fn
from vitlinear.checkpoints.download import DownloadError
from vitlinear.dense.backbone import MultiScaleBackbone
from vitlinear.dense.padding import attach_valid_sizes
from vitlinear.layers.attention.ttt_attention import TttAttention
from vitlinear.report import backend_report

RELEASED = {
    "vittt_t": ("vittt_tiny", 6_149_416),
    "vittt_s": ("vittt_small", 23_799_400),
    "vittt_b": ("vittt_base", 90_055_912),
    "h_vittt_t": ("h_vittt_tiny", 28_703_560),
    "h_vittt_s": ("h_vittt_small", 54_362_056),
    "h_vittt_b": ("h_vittt_base", 94_369_304),
}
SMALLEST = ("vittt_t", "h_vittt_t")
OUTPUTS = functools.cache(golden.outputs)
BACKENDS = ("eager", "library")


@functools.cache
def released_weights(released: str) -> dict[str, Tensor]:
    entries = golden.variants("vittt")[released]["state_dict"]
    return golden.upstream_state_dict(entries, "vittt")


@functools.cache
def released_model(released: str) -> nn.Module:
    """With the golden weights, float64."""
    return golden.loaded(RELEASED[released][0], released_weights(released))


def use(model: nn.Module, backend: str) -> nn.Module:
    for module in model.modules():
        if isinstance(module, TttAttention):
            module.backend = backend
    return model


@pytest.mark.parametrize("released", SMALLEST)
@diagonal(backend=golden.BACKENDS, size=golden.SIZES)
@torch.no_grad()
def test_golden_logits(released, size, backend):
    logits = use(released_model(released), backend)(golden.images(*size)[:1])[:, :64]
    expected = OUTPUTS("vittt")[f"{released}/{size[0]}x{size[1]}"][:1]
    assert golden.relative_error(logits, expected) < 1e-13


@pytest.mark.parametrize("released", SMALLEST)
@torch.no_grad()
def test_golden_logits_float32_and_fused(released):
    weights = released_model(released).state_dict()
    model = golden.loaded(RELEASED[released][0], weights, torch.float32)
    images, expected = golden.images(224, 224).float(), OUTPUTS("vittt")[f"{released}/224x224"]
    for made in (model, model.fuse()):
        assert golden.relative_error(made(images)[:, :64], expected) < 2e-6


def dense_form() -> MultiScaleBackbone:
    """The backbone of a detector from the authors' keys, float64."""
    backbone = MultiScaleBackbone("h_vittt_tiny", out_norms=True, out_norm_eps=1e-5).double()
    model = released_model("h_vittt_t").state_dict()
    weights = {f"model.{key}": value for key, value in model.items()}
    for index, width in enumerate(backbone.channels):
        for part in ("weight", "bias"):
            weights[f"norms.{index}.{part}"] = golden.weight(
                f"norm{index}.{part}", [width], "vittt"
            )
    backbone.load_state_dict({key: weights[key] for key in backbone.state_dict()})
    return backbone.eval()


# MILA's, which are padded alike, are compared at the other size in every run.
@some_by_night("size", [(200, 232), (202, 230)], every_run=[(202, 230)])
@torch.no_grad()
def test_golden_maps(size):
    """The authors add zeros to odd maps, and to images of other sides than multiples of 4."""
    maps = dense_form()(golden.images(*size)[:1])
    for stage, (x, step) in enumerate(zip(maps, (8, 4, 2, 1), strict=True)):
        expected = OUTPUTS("vittt")[f"h_vittt_t/{size[0]}x{size[1]}/{stage}"][:1]
        assert golden.relative_error(x[:, :8, ::step, ::step], expected) < 1e-13


@torch.no_grad()
def test_padded_image_of_a_detector_gives_what_it_gives_alone():
    """In that form, too."""
    torch.manual_seed(0)
    backbone = MultiScaleBackbone("test_h_vittt", out_norms=True).double().eval()
    for parameter in backbone.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    sizes = [(75, 61), (50, 96), (96, 90)]
    images = torch.randn(3, 3, 96, 96, dtype=torch.float64)
    together = backbone(attach_valid_sizes(images.clone(), sizes))
    for i, (height, width) in enumerate(sizes):
        for x, alone in zip(together, backbone(images[i : i + 1, :, :height, :width]), strict=True):
            part = x[i, :, : alone.shape[2], : alone.shape[3]]
            assert golden.relative_error(part, alone[0]) < 1e-12


@pytest.mark.parametrize("released", RELEASED)
def test_parameters_and_keys_of_every_variant(released):
    name, count = RELEASED[released]
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count
    assert golden.variants("vittt")[released]["num_params"] == count
    weights = {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, shape, dtype in golden.variants("vittt")[released]["state_dict"]
    }
    converted = checkpoint_filter_fn(weights, model)
    assert {k: v.shape for k, v in converted.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


@pytest.mark.parametrize("released", SMALLEST)
def test_published_checkpoint_file(released, tmp_path):
    """Averaged weights go before raw ones; rotary tables of 224 x 224 are left out."""
    weights, path = released_weights(released), tmp_path / "ViTTT.pth"
    raw = {key: torch.zeros_like(value) for key, value in weights.items()}
    plain = {"model": weights, "epoch": 299, "max_accuracy": 76.5}
    averaged = {**plain, "model": raw, "state_dict_ema": weights, "max_accuracy_e": 84.0}
    torch.save(averaged if released.startswith("h_") else plain, path)
    model = timm.create_model(
        RELEASED[released][0], pretrained=True, pretrained_cfg_overlay={"file": str(path)}
    )
    expected = released_model(released).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key].to(value.dtype)), key


def test_detector_with_buffers_that_nobody_uses(tmp_path):
    """Rotary tables under another name than in classifiers."""
    path, weights = tmp_path / "mask_rcnn.pth", {}
    for key, value in released_weights("h_vittt_t").items():
        if key.endswith("rotations"):
            key = key.replace(".rope.", ".attn.rope.")
        if not key.startswith(("norm.", "head.")):
            weights[f"backbone.{key}"] = value
    assert any(key.endswith("attn.rope.rotations") for key in weights)
    torch.save({"state_dict": weights}, path)
    backbone = MultiScaleBackbone("h_vittt_tiny", checkpoint_path=path)
    expected = released_model("h_vittt_t").state_dict()
    for key, value in backbone.model.state_dict().items():
        assert torch.equal(value, expected[key].to(value.dtype)), key


@pytest.mark.parametrize("name", [name for name, _ in RELEASED.values()])
def test_pretrained_cfg(name):
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.paper_ids, cfg.tag, cfg.input_size) == ("arXiv:2512.01643", "in1k", (3, 224, 224))
    assert cfg.crop_pct == 0.875 and cfg.origin_url == "https://github.com/LeapLabTHU/ViTTT"
    with pytest.raises(DownloadError, match="cloud.tsinghua.edu.cn.*not confirmed reachable"):
        timm.create_model(name, pretrained=True)


# Giga multiply-adds of convolutions and products of matrices.
COUNTED = {"vittt_tiny": 1.22, "h_vittt_tiny": 4.90}


@diagonal(name=list(COUNTED), backend=BACKENDS)
def test_multiply_adds_of_released_code(name, backend):
    """As counted on the authors' models; tests/cards counts the other sizes."""
    counted = golden.giga_multiply_adds(name, attn_backend=backend)
    assert counted == pytest.approx(COUNTED[name], rel=0.01)


@torch.no_grad()
def test_incomplete_patches_are_left_out():
    """As released; an image smaller than a patch is padded to one."""
    model = timm.create_model("test_vittt").double().eval()
    x = torch.randn(1, 3, 50, 40, dtype=torch.float64)
    torch.testing.assert_close(model(x), model(x[:, :, :48, :32]))
    padded = nn.functional.pad(x[:, :, :5], (0, 0, 0, 11))
    torch.testing.assert_close(model(x[:, :, :5]), model(padded))


def test_initial_values():
    """Linear layers, the inner networks and the classifier normal, convolutions as PyTorch's."""
    torch.manual_seed(0)
    model = timm.create_model("test_h_vittt")
    conv = model.stages[1].downsample.conv3.conv  # 128 channels in
    assert conv.weight.abs().max() <= 128**-0.5 and conv.weight.detach().std() > 0.04
    block = model.stages[3].blocks[0]
    for weight in (model.head.fc.weight, block.mlp.fc1.weight, block.attn.w1, block.attn.w2):
        assert weight.detach().std() == pytest.approx(0.02, rel=0.1)
    patches = timm.create_model("test_vittt").patch_embed.proj
    assert patches.bias.any() and patches.weight.detach().std() > 0.02


def test_backend_report():
    report = backend_report(timm.create_model("test_h_vittt"), (2, 3, 96, 64))
    # Keys read the first weights, and make the state; queries read what the step has made.
    assert [row.attn_type for row in report] == ["identity"] * 3 * 5
    assert report[0].shape == (2, 24 * 16, 3, 8)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="dim 48 does not divide into 5 heads"):
        timm.create_model("test_vittt", num_heads=5)
    with pytest.raises(ValueError, match="four entries"):
        timm.create_model("test_h_vittt", depths=(1, 1))
