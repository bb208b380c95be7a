"""RAVLT, MAViT and NaLaFormer against the released code: weights, logits, attention, counts."""

from __future__ import annotations

import argparse
import functools
import itertools
from typing import NamedTuple

import pytest
import timm
import torch
from timm.layers import LayerScale

from tests import golden
from tests.pairwise import diagonal, some_by_night
from vitlinear import ops
from vitlinear.checkpoints import checkpoint_filter_fn
from vitlinear.checkpoints.mappings import PYRAMID
from vitlinear.layers import GatedAttention, NormGatedAttention


class Released(NamedTuple):
    """A model of the authors', and what is known of it.

    Attributes:
        name: Our name.
        family: File of the golden archive.
        params: Parameters.
        projections: Giga multiply-adds of convolutions and linear layers at 224 x 224.
        attention: Those of the products of attention.
        layer_scale: Initial value by stage.
    """

    name: str
    family: str
    params: int
    projections: float
    attention: float
    layer_scale: tuple[float, ...]


ONES, MIXED, SMALL = (1.0,) * 4, (1.0, 1.0, 1e-6, 1e-6), (1e-6,) * 4

RELEASED = {
    "RAVLT_T": Released("ravlt_t", "rala", 14_897_768, 2.412, 0.201, ONES),
    "RAVLT_S": Released("ravlt_s", "rala", 25_591_208, 4.506, 0.372, ONES),
    "RAVLT_B": Released("ravlt_b", "rala", 48_241_288, 9.802, 0.778, MIXED),
    "RAVLT_L": Released("ravlt_l", "rala", 95_242_440, 16.092, 1.117, SMALL),
    "MALA_T": Released("mavit_t", "mala", 16_449_128, 2.439, 0.201, ONES),
    "MALA_S": Released("mavit_s", "mala", 27_142_568, 4.533, 0.371, ONES),
    "MALA_B": Released("mavit_b", "mala", 49_792_648, 9.829, 0.776, MIXED),
    "MALA_L": Released("mavit_l", "mala", 97_766_088, 16.142, 1.114, SMALL),
    "NALAFORMER_XT": Released("nalaformer_xt", "nalaformer", 6_142_248, 0.582, 0.062, ONES),
    "NALAFORMER_T": Released("nalaformer_t", "nalaformer", 15_907_752, 2.579, 0.278, ONES),
    "NALAFORMER_S": Released("nalaformer_s", "nalaformer", 25_654_184, 4.522, 0.513, ONES),
    "NALAFORMER_B": Released("nalaformer_b", "nalaformer", 52_002_952, 10.558, 1.182, MIXED),
    "NALAFORMER_L": Released("nalaformer_l", "nalaformer", 95_426_760, 16.130, 1.550, SMALL),
}
SMALLEST = ("RAVLT_T", "MALA_T", "NALAFORMER_XT", "NALAFORMER_T")
FAMILIES = ("ravlt", "mavit", "nalaformer")


@functools.lru_cache(maxsize=1)
def released_weights(released: str) -> dict[str, torch.Tensor]:
    family = RELEASED[released].family
    return golden.upstream_state_dict(golden.variants(family)[released]["state_dict"])


@functools.cache
def released_model(released: str) -> torch.nn.Module:
    """The model with the golden weights, float64."""
    return golden.loaded(RELEASED[released].name, released_weights(released))


@pytest.fixture(scope="module")
def ravlt_t():
    return released_model("RAVLT_T")


@pytest.mark.parametrize("released", SMALLEST)
@diagonal(backend=golden.BACKENDS, size=golden.SIZES)
def test_golden_logits(released, size, backend):
    model = released_model(released)
    for module in model.modules():
        if isinstance(module, GatedAttention):
            module.backend = backend
    with torch.no_grad():
        logits = model(golden.images(*size)[:1])[:, :64]
    assert golden.relative_error(logits, golden.logits(released, *size)[:1]) < 1e-6


@pytest.mark.parametrize("released", SMALLEST)
def test_golden_logits_float32(released):
    weights = released_model(released).state_dict()
    model = golden.loaded(RELEASED[released].name, weights, torch.float32)
    with torch.no_grad():
        logits = model(golden.images(224, 224).float())[:, :64]
    assert golden.relative_error(logits, golden.logits(released, 224, 224)) < 2e-6


@pytest.mark.parametrize(
    "case, layer, attn_type",
    [
        ("rala_a", GatedAttention, "rala"),
        ("mala_a", GatedAttention, "mala"),
        ("nala_a", NormGatedAttention, "nala"),
        ("rope_softmax_a", GatedAttention, "softmax"),
    ],
)
@pytest.mark.parametrize("backend", ["eager", "library"])
def test_golden_attention(case, layer, attn_type, backend):
    case = golden.attention_case(case)
    module = layer(case["C"], case["heads"], attn_type, backend=backend).double()
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
    name, family, count, *_ = RELEASED[released]
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count
    assert golden.variants(family)[released]["num_params"] == count
    entries = golden.variants(family)[released]["state_dict"]
    weights = {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, shape, dtype in entries
    }
    converted = checkpoint_filter_fn(weights, model)
    assert {k: v.shape for k, v in converted.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    # No weight depends on the number of heads; the released buffer of angles does.
    angles = [shape for key, shape, _ in entries if key.endswith("RoPE.angle")]
    assert [[stage.rotary.head_dim // 2] for stage in model.stages] == angles


@pytest.mark.parametrize("released", RELEASED)
def test_initial_layer_scale(released):
    values = RELEASED[released].layer_scale
    model = timm.create_model(RELEASED[released].name, device="meta")
    scales = [m for m in model.modules() if isinstance(m, LayerScale)]
    for scale in scales:  # random weights of a large model would take seconds
        scale.to_empty(device="cpu").reset_parameters()
    per_stage = [
        {float(x) for b in stage.blocks for ls in (b.ls1, b.ls2) for x in ls.gamma.tolist()}
        for stage in model.stages
    ]
    assert per_stage == [{float(torch.tensor(value))} for value in values]


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
    """A callable that unpickling would have to execute."""

    def __reduce__(self):
        return (print, ("executed",))


def test_checkpoint_that_needs_code_is_refused(tmp_path, capsys):
    path = tmp_path / "bad.pth"
    torch.save({"model": released_weights("RAVLT_T"), "extra": Payload()}, path)
    with pytest.raises(ValueError, match=r"needs code .*\(print\)"):
        timm.create_model("ravlt_t", pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert "executed" not in capsys.readouterr().out


def test_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "RAVLT_S.pth"
    torch.save({"model": released_weights("RAVLT_S")}, path)
    with pytest.raises(RuntimeError, match=r"stages\.0\.blocks\.2"):
        timm.create_model("ravlt_t", pretrained=True, pretrained_cfg_overlay={"file": str(path)})


@pytest.mark.parametrize("released", RELEASED)
def test_pretrained_cfg_is_complete(released):
    name = RELEASED[released].name
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.paper_ids.startswith("arXiv:") and cfg.origin_url.startswith("https://github.com/")
    assert cfg.input_size == (3, 224, 224) and cfg.crop_pct == 0.875
    # Confirmed on the hub: all of RALA's, two of MALA's; NaLaFormer has published none.
    confirmed = name.startswith("ravlt") or name in ("mavit_b", "mavit_l")
    assert timm.is_model_pretrained(name) == confirmed
    assert not timm.is_model_pretrained(f"{name}_linear")
    if confirmed:
        assert cfg.hf_hub_id == f"aldjalkdf/{'RAVLT' if 'ravlt' in name else 'MAViT'}"
        assert cfg.hf_hub_filename.lower() == f"{name}.pth" and cfg.tag == "in1k"
        assert cfg.license == ("mit" if name.startswith("ravlt") else None)


# Of each family the smallest and the largest in every run, with the backends in turn: sizes differ
# in widths and depths, which the number of parameters above tells of all.
COUNTED = [("RAVLT_T", "eager"), ("RAVLT_L", "library"), ("MALA_T", "library"), ("MALA_L", "eager")]
COUNTED += [("NALAFORMER_XT", "eager"), ("NALAFORMER_L", "library")]


@some_by_night("released, backend", itertools.product(RELEASED, golden.BACKENDS), COUNTED)
def test_multiply_adds_of_released_code(released, backend):
    """As counted on the authors' models."""
    row = RELEASED[released]
    counted = golden.giga_multiply_adds(row.name, attn_backend=backend)
    assert counted == pytest.approx(row.projections + row.attention, rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_sibling_has_no_softmax(family):
    published = timm.create_model(f"{family}_t", device="meta")
    linear = timm.create_model(f"{family}_t_linear", device="meta")
    types = {
        name: [m.attn_type for m in model.modules() if isinstance(m, GatedAttention)]
        for name, model in (("published", published), ("linear", linear))
    }
    mechanism = {"ravlt": "rala", "mavit": "mala", "nalaformer": "nala"}[family]
    assert types["published"] == [mechanism] * 4 + ["softmax"] * 8
    assert types["linear"] == [mechanism] * 12
    assert published.state_dict().keys() == linear.state_dict().keys()
