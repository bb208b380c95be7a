"""Finding the weights in a checkpoint, and translating keys one by one."""

from __future__ import annotations

import pytest
import torch

from vitlinear.checkpoints import unwrap_state_dict
from vitlinear.checkpoints.mappings import PYRAMID

WEIGHTS = {"a.weight": torch.ones(2)}


@pytest.mark.parametrize(
    "checkpoint",
    [
        WEIGHTS,
        {"model": WEIGHTS, "epoch": 1},
        {"state_dict": {"module.a.weight": WEIGHTS["a.weight"]}},
        {"model": {"a.weight": torch.zeros(2)}, "model_ema": WEIGHTS},
        {"model": {"model": WEIGHTS}},
        {"model": {"_orig_mod.module.a.weight": WEIGHTS["a.weight"]}, "model_ema": None},
        {"model": WEIGHTS, "model_ema": {}},
        {"model": WEIGHTS, "model_ema": {"decay": 0.9999, "n_averaged": torch.tensor(7)}},
        {"model_ema": {"decay": 0.9999, "module": WEIGHTS}},
        {"module": WEIGHTS, "ds_version": "0.14"},
        {"epoch": 3, "model_state_dict": WEIGHTS, "optimizer_state_dict": {"state": {}}},
        {"ema_state_dict": {"a.weight": torch.zeros(2)}, "state_dict": WEIGHTS},
        {"net": WEIGHTS, "acc": 93.1},
        {"weights": WEIGHTS},
    ],
)
def test_unwrap(checkpoint):
    assert unwrap_state_dict(checkpoint) == WEIGHTS


@pytest.mark.parametrize("checkpoint", [{}, {"epoch": 3}, {"model": {"lr": 0.1}}])
def test_nothing_to_unwrap(checkpoint):
    with pytest.raises(ValueError, match="no weights in this checkpoint"):
        unwrap_state_dict(checkpoint)


KEYS = {
    "patch_embed.proj.0.weight": "stem.conv1.conv.weight",
    "patch_embed.proj.10.running_var": "stem.conv4.bn.running_var",
    "layers.2.blocks.5.gamma_2": "stages.2.blocks.5.ls2.gamma",
    "layers.0.blocks.1.norm1.norm.bias": "stages.0.blocks.1.norm1.bias",
    "layers.0.blocks.1.ffn.dwconv.weight": "stages.0.blocks.1.mlp.dwconv.weight",
    "layers.3.blocks.0.attn.qkvo.weight": "stages.3.blocks.0.attn.qkvo.weight",
    "layers.1.blocks.0.pos.bias": "stages.1.blocks.0.pos.bias",
    "layers.0.downsample.reduction.weight": "stages.1.downsample.conv.weight",
    "layers.0.downsample.norm.running_mean": "stages.1.downsample.bn.running_mean",
    "proj.bias": "final.conv.bias",
    "norm.weight": "final.bn.weight",
    "head.weight": "head.fc.weight",
    "patch_embed.proj.2.weight": "patch_embed.proj.2.weight",
    "something.else": "something.else",
}


@pytest.mark.parametrize("theirs", KEYS)
def test_key(theirs):
    assert list(PYRAMID.convert({theirs: torch.ones(1)}, {})) == [KEYS[theirs]]


def test_rotary_buffer_is_dropped():
    assert PYRAMID.convert({"layers.0.RoPE.angle": torch.ones(32)}, {}) == {}


def test_only_axes_of_length_one_are_reshaped():
    theirs = {"head.weight": torch.ones(5, 3, 1, 1), "head.bias": torch.ones(4)}
    ours = {"head.fc.weight": torch.empty(5, 3), "head.fc.bias": torch.empty(5)}
    converted = PYRAMID.convert(theirs, ours)
    assert converted["head.fc.weight"].shape == (5, 3)
    assert converted["head.fc.bias"].shape == (4,)  # for load_state_dict to report
