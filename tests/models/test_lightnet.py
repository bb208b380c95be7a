"""LightNet against its definition; there is no released model to compare with."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch.nn import functional as F

from vitlinear.report import backend_report


def parameters(dim: int, heads: int, depth: int = 12, classes: int = 1000) -> int:
    """Counted from the definition."""
    head_dim = dim // heads
    patches = 3 * 16 * 16 * dim + dim
    tpe = 2 * (2 * dim + heads + dim + dim * dim)
    attention = 4 * dim * dim + dim + 2 * dim * head_dim
    block = dim + attention + dim + 3 * dim * 2 * dim
    return patches + tpe + depth * block + dim + (dim + 1) * classes


@pytest.mark.parametrize(
    "size, dim, heads", [("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12)]
)
def test_parameters(size, dim, heads):
    model = timm.create_model(f"lightnet_{size}", device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters(dim, heads)
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert biases == {"patch_embed.proj.bias", "head.bias"}
    assert len(model.blocks) == 12 and model.blocks[0].attn.head_dim == 64
    assert timm.get_pretrained_cfg(f"lightnet_{size}").paper_ids == "arXiv:2405.21022"
    assert not timm.is_model_pretrained(f"lightnet_{size}")


@pytest.mark.parametrize("bidirectional", [False, True])
def test_forward_by_hand(bidirectional):
    torch.manual_seed(0)
    model = timm.create_model("test_lightnet", bidirectional=bidirectional).double().eval()
    assert model.position.rows.bidirectional is bidirectional
    x = torch.randn(2, 3, 90, 64).double()
    maps = F.conv2d(F.pad(x, (0, 0, 0, 6)), *model.patch_embed.proj.parameters(), stride=16)
    tokens = model.position(maps.permute(0, 2, 3, 1)).flatten(1, 2)

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    for block in model.blocks:
        tokens = tokens + block.attn(norm(tokens, block.norm1.weight), 6, 4)
        y = norm(tokens, block.norm2.weight)
        w1, w2, w3 = block.mlp.fc1_g.weight, block.mlp.fc1_x.weight, block.mlp.fc2.weight
        assert w1.shape == (128, 64)
        tokens = tokens + (F.silu(y @ w1.T) * (y @ w2.T)) @ w3.T
    expected = model.head(norm(tokens, model.norm.weight).mean(1))
    torch.testing.assert_close(model(x), expected)


def test_positions_at_first():
    tpe = timm.create_model("test_lightnet").position
    for axis in (tpe.rows, tpe.cols):
        assert (axis.query == 1).all() and (axis.key == 1).all() and (axis.log_decay == 0).all()


def test_there_is_no_class_token():
    with pytest.raises(AssertionError, match="'token' is not supported"):
        timm.create_model("test_lightnet", global_pool="token")
    model = timm.create_model("test_lightnet")
    assert model.num_prefix_tokens == 0 and model.no_weight_decay() == set()
    with pytest.raises(TypeError, match="img_size"):
        timm.create_model("test_lightnet", img_size=224)


def test_layer_decay_covers_every_parameter():
    model = timm.create_model("test_lightnet")
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.7)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    # patches and positions, four blocks, norm and classifier
    assert len({group["lr_scale"] for group in groups}) == 6


def test_backend_report():
    model = timm.create_model("test_lightnet", attn_backend="library")
    report = backend_report(model, (2, 3, 96, 64))
    assert [row.attn_type for row in report] == ["lightnet"] * 4
    assert report[0].shape == (2, 24, 2, 32) and report[0].backend == "library"
