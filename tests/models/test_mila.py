"""MILA against the released code of MLLA: weights, logits, attention, maps, counts."""

from __future__ import annotations

import functools
import warnings

import pytest
import timm
import torch
from torch import Tensor, nn

from tests import golden
from tests.pairwise import diagonal, some_by_night
from vitlinear import ops
from vitlinear.checkpoints import checkpoint_filter_fn
from vitlinear.checkpoints.download import DownloadError
from vitlinear.checkpoints.mappings import MILA as MAPPING
from vitlinear.dense.backbone import MultiScaleBackbone
from vitlinear.layers import InputValueAttention, InvertedDownsample, InvertedStem
from vitlinear.models.mila import MilaBlock
from vitlinear.ops import naive
from vitlinear.report import backend_report

RELEASED = {
    "mlla_t": ("mila_tiny", 24_392_200),
    "mlla_s": ("mila_small", 43_015_048),
    "mlla_b": ("mila_base", 95_983_960),
}
OUTPUTS = functools.cache(golden.outputs)
BACKENDS = ("eager", "library")


@functools.cache
def released_weights() -> dict[str, Tensor]:
    entries = golden.variants("mlla")["mlla_t"]["state_dict"]
    return golden.upstream_state_dict(entries, "mlla")


@pytest.fixture(scope="module")
def mila_tiny() -> nn.Module:
    """With the golden weights, float64."""
    return golden.loaded("mila_tiny", released_weights())


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def use(model: nn.Module, backend: str) -> nn.Module:
    for module in model.modules():
        if isinstance(module, InputValueAttention):
            module.backend = backend
    return model


@diagonal(backend=golden.BACKENDS, size=golden.SIZES)
@torch.no_grad()
def test_golden_logits(mila_tiny, size, backend):
    logits = use(mila_tiny, backend)(golden.images(*size)[:1])[:, :64]
    assert golden.relative_error(logits, golden.logits("mlla_t", *size)[:1]) < 1e-13


@torch.no_grad()
def test_golden_logits_float32(mila_tiny):
    model = golden.loaded("mila_tiny", mila_tiny.state_dict(), torch.float32)
    logits = model(golden.images(224, 224).float())[:, :64]
    assert golden.relative_error(logits, golden.logits("mlla_t", 224, 224)) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["mlla_attn_a", "mlla_attn_b"])
def test_golden_attention(case, backend):
    case = golden.attention_case(case, "mlla")
    module = InputValueAttention(case["C"], case["heads"], backend).double()
    rotations = case["weights"].pop("rope.rotations")
    module.load_state_dict(case["weights"])
    H, W = case["H"], case["W"]
    rotary = golden.full_width_tables(H, W, case["C"])
    assert rotary.rows.shape[1] + rotary.cols.shape[1] == rotations.shape[2]

    x = case["x"].unflatten(1, (H, W)).requires_grad_()
    out = module(x, torch.ones_like(x), rotary)
    (grad,) = torch.autograd.grad(out, x, case["grad"].unflatten(1, (H, W)))
    assert golden.relative_error(out.flatten(1, 2), case["out"]) < 1e-14
    assert golden.relative_error(grad.flatten(1, 2), case["grad_input"]) < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["mlla_block_a", "mlla_block_b"])
def test_golden_block(case, backend):
    """With gradient checkpointing as without; every parameter gets a gradient."""
    case = golden.attention_case(case, "mlla")
    H, W = case["H"], case["W"]
    block = MilaBlock(case["C"], case["heads"], 4.0, 0.0, 0.0, backend).double()
    ours = {f"stages.0.blocks.0.{k}": v for k, v in block.state_dict().items()}
    theirs = {f"layers.0.blocks.0.{k}": v for k, v in case["weights"].items()}
    converted = MAPPING.convert(theirs, ours)
    block.load_state_dict({k.partition("blocks.0.")[2]: v for k, v in converted.items()})
    rotary = golden.full_width_tables(H, W, case["C"])

    found = []
    for block.grad_checkpointing in (False, True):
        x = case["x"].unflatten(1, (H, W)).requires_grad_()
        out = block(x, rotary)
        wanted = (x, *block.parameters())
        grads = torch.autograd.grad(out, wanted, case["grad"].unflatten(1, (H, W)))
        assert golden.relative_error(out.flatten(1, 2), case["out"]) < 1e-14
        assert golden.relative_error(grads[0].flatten(1, 2), case["grad_input"]) < 1e-14
        found.append(grads)
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def dense_form(out_indices=(0, 1, 2, 3)) -> MultiScaleBackbone:
    """The backbone of a detector from the authors' keys, float64."""
    backbone = MultiScaleBackbone("mila_tiny", out_indices, out_norms=True, out_norm_eps=1e-5)
    model = timm.create_model("mila_tiny", device="meta")
    weights = {
        f"model.{key}": value
        for key, value in checkpoint_filter_fn(released_weights(), model).items()
    }
    for index, width in zip(out_indices, backbone.channels, strict=True):
        for part in ("weight", "bias"):
            key = f"norm{index}.{part}"
            weights[f"norms.{index}.{part}"] = golden.weight(key, [width], "mlla")
    own = backbone.double().state_dict()
    backbone.load_state_dict({key: weights[key] for key in own})
    return backbone.eval()


# H-ViT³'s, which are padded alike, are compared at the other size in every run.
@some_by_night("size", [(200, 232), (202, 230)], every_run=[(200, 232)])
@torch.no_grad()
def test_golden_maps(size):
    """The authors add zeros to odd maps, and to images of other sides than multiples of 4."""
    maps = dense_form()(golden.images(*size)[:1])
    for stage, (x, step) in enumerate(zip(maps, (8, 4, 2, 1), strict=True)):
        expected = OUTPUTS("mlla")[f"mlla_t/{size[0]}x{size[1]}/{stage}"][:1]
        part = x[:, :8, ::step, ::step]
        assert golden.relative_error(part, expected) < 1e-13


@torch.no_grad()
def test_forms_of_classifier_and_detector():
    """Equal at multiples of 32 pixels; at others the classifier's maps are not the detector's."""
    model = timm.create_model("test_mila").double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    for size, equal in (((64, 96), True), ((66, 90), False)):
        maps = []
        for dense in (False, True):
            for module in model.modules():
                if isinstance(module, InvertedStem | InvertedDownsample):
                    module.pads_odd_maps = dense
            maps.append(model.forward_intermediates(torch.ones(1, 3, *size).double())[1])
        assert [a.shape for a in maps[0]] == [b.shape for b in maps[1]]
        assert all(torch.equal(a, b) for a, b in zip(*maps, strict=True)) == equal


@pytest.mark.parametrize("sides", [(66, 90), (75, 61), (64, 96)])
def test_maps_of_a_padded_batch(sides):
    """Equal to those of the image alone, where both get zeros on odd maps; gradients likewise."""
    backbone = MultiScaleBackbone("test_mila", out_norms=True).double().eval()
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.1)
    image = torch.randn(1, 3, *sides, dtype=torch.float64)
    other = torch.randn(3, 90, 102, dtype=torch.float64)
    batch = other.new_full((2, *other.shape), torch.nan)
    batch[0, :, : sides[0], : sides[1]], batch[1] = image[0], other
    alone, together = backbone(image), backbone(batch, [sides, other.shape[1:]])
    for x, row in zip(alone, together, strict=True):
        height, width = x.shape[2:]
        assert golden.relative_error(row[0, :, :height, :width], x[0]) < 1e-12
        assert not row[0, :, height:].any() and not row[0, :, :, width:].any()
    wanted = list(backbone.model.parameters())
    grads = [torch.autograd.grad(sum(x[0].square().sum() for x in maps), wanted)
             for maps in (alone, together)]  # fmt: skip
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("released", RELEASED)
def test_parameters_and_keys_of_every_variant(released):
    name, count = RELEASED[released]
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count
    assert golden.variants("mlla")[released]["num_params"] == count
    entries = golden.variants("mlla")[released]["state_dict"]
    weights = {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, shape, dtype in entries
    }
    converted = checkpoint_filter_fn(weights, model)
    assert {k: v.shape for k, v in converted.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    # No weight depends on the number of heads. The parts of a head are 32 channels everywhere.
    assert all(
        module.head_dim == 32
        for module in model.modules()
        if isinstance(module, InputValueAttention)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_multiply_adds_of_released_code(backend):
    """Of convolutions and products; tests/cards counts the other sizes."""
    counted = golden.giga_multiply_adds("mila_tiny", attn_backend=backend)
    assert counted == pytest.approx(4.13, rel=0.01)


WRAPPED = {
    "training file": lambda weights: {
        "model": {k: torch.zeros_like(v) for k, v in weights.items()},
        "state_dict_ema": weights,
        "max_accuracy": 83.4,
        "max_accuracy_e": 83.5,
        "epoch": 299,
    },
    "detector": lambda weights: {
        "state_dict": {
            f"backbone.{k}": v for k, v in weights.items() if not k.startswith(("norm.", "head."))
        }
    },
}


@pytest.mark.parametrize("form", WRAPPED)
def test_published_checkpoint_file(form, tmp_path, mila_tiny):
    """Averaged weights go before raw ones; the rotary tables of 224 x 224 are left out."""
    path = tmp_path / "MLLA_T.pth"
    torch.save(WRAPPED[form](released_weights()), path)
    kwargs = {"features_only": True} if form == "detector" else {}
    model = timm.create_model(
        "mila_tiny", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs
    )
    expected = mila_tiny.state_dict()
    for key, value in model.state_dict().items():
        key = key.replace("stages_", "stages.")
        assert torch.equal(value, expected[key].to(value.dtype)), key


@pytest.mark.parametrize("name", [name for name, _ in RELEASED.values()])
def test_pretrained_cfg(name):
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.paper_ids, cfg.tag, cfg.input_size) == ("arXiv:2405.16605", "in1k", (3, 224, 224))
    assert cfg.crop_pct == 0.875 and cfg.origin_url == "https://github.com/LeapLabTHU/MLLA"
    with pytest.raises(DownloadError, match="cloud.tsinghua.edu.cn.*pretrained_cfg_overlay"):
        timm.create_model(name, pretrained=True)


def test_initial_values():
    """Linear layers and the classifier normal, convolutions as PyTorch makes them."""
    model = timm.create_model("test_mila")
    conv = model.stages[1].downsample.conv3.conv  # 128 channels in
    assert conv.weight.abs().max() <= 128**-0.5 and conv.weight.detach().std() > 0.04
    assert conv.bias.abs().max() > 0
    for layer in (model.head.fc, model.stages[3].blocks[0].mlp.fc1):
        assert layer.weight.detach().std() == pytest.approx(0.02, rel=0.1) and not layer.bias.any()
    model.init_weights(needs_reset=True)
    assert model.stages[0].blocks[0].pos1.bias.any()
    assert model.head.fc.weight.detach().std() == pytest.approx(0.02, rel=0.1)


def test_backend_report():
    model = timm.create_model("test_mila", attn_backend="library")
    report = backend_report(model, (2, 3, 96, 64))
    assert [row.attn_type for row in report] == ["elu"] * 5
    assert report[0].shape == (2, 24 * 16, 3, 8)
    assert {row.backend for row in report} == {"library"}


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="dim 24 does not divide into 5 heads"):
        timm.create_model("test_mila", num_heads=(5, 2, 2, 4))
    with pytest.raises(ValueError, match="needs a dim divisible by 4, got 30"):
        timm.create_model("test_mila", embed_dims=(30, 32, 48, 64))
    with pytest.raises(ValueError, match="four entries"):
        timm.create_model("test_mila", depths=(1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [-1e4, -20.0, 20.0, 1e4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_finite_where_features_round_to_zero(dtype, bias, backend):
    """elu(x) + 1 is 0 below -17 in float32, sooner in half types: then 1e-6 alone normalises."""
    layer = InputValueAttention(32, 2, backend)
    nn.init.constant_(layer.qk.bias, bias)
    layer = layer.to(dtype)
    u = torch.randn(2, 5, 6, 32, dtype=dtype).requires_grad_()
    rotary = ops.full_width_rotary_tables(5, 6, 32)
    out = layer(u, torch.ones_like(u), rotary)
    grads = torch.autograd.grad(out.float().sum(), [u, *layer.parameters()])
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)
    if bias < 0:
        lepe = layer.lepe(u)
        torch.testing.assert_close(out, lepe, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sample_that_is_all_padding(dtype, backend):
    layer = InputValueAttention(32, 2, backend).to(dtype)
    u = torch.randn(2, 5, 6, 32, dtype=dtype).requires_grad_()
    mask = torch.zeros(2, 5, 6, dtype=torch.bool)
    mask[1] = True
    rotary = ops.full_width_rotary_tables(5, 6, 32)
    out = layer(u, torch.ones_like(u), rotary, mask)
    grads = torch.autograd.grad(out.float().sum(), [u, *layer.parameters()])
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)
    assert not out[1].any()


def test_attention_is_the_definition():
    layer = InputValueAttention(24, 3).double()
    u, gate = torch.randn(2, 2, 4, 5, 24, dtype=torch.float64)
    rotary = ops.full_width_rotary_tables(4, 5, 24, dtype=torch.float64)
    q, k = (u.flatten(1, 2) @ layer.qk.weight.T + layer.qk.bias).chunk(2, dim=-1)
    q, k, v = (x.unflatten(-1, (3, 8)) for x in (q, k, u.flatten(1, 2)))
    out = naive.linear_attention(q, k, v, "elu", rotary).reshape(u.shape)
    torch.testing.assert_close(layer(u, gate, rotary), (out + layer.lepe(u)) * gate)


def test_nothing_is_kept_of_activations_and_norms():
    """Backward makes them again from what goes in."""
    block = MilaBlock(32, 2, 4.0, 0.0, 0.0, "library")
    x = torch.randn(1, 16, 16, 32, requires_grad=True)
    rotary = ops.full_width_rotary_tables(16, 16, 32)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x, rotary)
    parameters = {p.untyped_storage()._cdata for p in block.parameters()}
    maps = sum(size for key, size in kept.items() if key not in parameters) / x.nbytes
    assert out.requires_grad and maps < 15.5, maps


def test_no_warning_in_training():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = timm.create_model("test_mila", drop_path_rate=0.1).train()
        model(torch.randn(2, 3, 64, 64)).sum().backward()
