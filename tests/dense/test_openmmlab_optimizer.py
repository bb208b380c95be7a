"""Layer decay for mmengine: every group against rates and decays worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from tests.dense.openmmlab import packages
from vitlinear.errors import UserError

pytestmark = packages()

from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS  # noqa: E402

from vitlinear.dense.openmmlab import Backbone  # noqa: E402

LR, DECAY = 1e-3, 0.05


class Detector(nn.Module):
    """A backbone, a neck and a head; the parts that rules tell apart."""

    def __init__(self, model: str, **kwargs: Any) -> None:
        super().__init__()
        self.backbone = Backbone(model, out_norms=True, **kwargs)
        self.neck = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8))
        self.bbox_head = nn.Linear(8, 4)


def groups(model: nn.Module, **paramwise: Any) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter by its name."""
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        {
            "type": "vitlinear.LayerDecayOptimWrapperConstructor",
            "optim_wrapper_cfg": {
                "type": "OptimWrapper",
                "optimizer": {"type": "AdamW", "lr": LR, "weight_decay": DECAY},
            },
            "paramwise_cfg": paramwise,
        }
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = constructor(model).optimizer
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_layers_of_a_pyramid() -> None:
    """Layers of test_ravlt, by hand: stem, 0.0, 1.0, 2.0, 2.1, 3.0; 6 in all.

    A downsampling belongs to the block behind it.
    """
    model = Detector("test_ravlt")
    found = groups(model, layer_decay=0.5)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, (lr, weight_decay) in found.items():
        prefixes = {
            "backbone.model.stem.": 6,
            "backbone.model.stages.0.": 5,
            "backbone.model.stages.1.": 4,
            "backbone.model.stages.2.downsample.": 3,
            "backbone.model.stages.2.blocks.0.": 3,
            "backbone.model.stages.2.blocks.1.": 2,
            "backbone.model.stages.3.": 1,
            "backbone.norms.": 0,
            "neck.": 0,
            "bbox_head.": 0,
        }
        (exponent,) = (value for prefix, value in prefixes.items() if name.startswith(prefix))
        assert lr == pytest.approx(LR * 0.5**exponent), name
        assert weight_decay == DECAY, name


def test_isotropic_model_and_its_pyramid() -> None:
    """Embedding, four blocks; the pyramid is new and learns at the full rate."""
    found = groups(Detector("test_inline_deit"), layer_decay=0.8)
    expected = {
        "backbone.model.patch_embed.proj.weight": (LR * 0.8**5, DECAY),
        "backbone.model.pos_embed": (LR * 0.8**5, 0.0),
        "backbone.model.blocks.0.norm1.weight": (LR * 0.8**4, DECAY),
        "backbone.model.blocks.3.mlp.fc2.bias": (LR * 0.8, DECAY),
        "backbone.pyramid.levels.0.0.weight": (LR, DECAY),
        "backbone.norms.3.weight": (LR, DECAY),
        "bbox_head.weight": (LR, DECAY),
    }
    for name, (lr, weight_decay) in expected.items():
        assert found[name] == (pytest.approx(lr), weight_decay), name


def test_with_the_rules_of_mmengine() -> None:
    found = groups(
        Detector("test_inline_deit"),
        layer_decay=0.5,
        norm_decay_mult=0.0,
        bias_lr_mult=2.0,
        bias_decay_mult=0.0,
        custom_keys={
            "bbox_head": {"lr_mult": 10.0},
            "blocks.2": {"lr_mult": 0.1, "decay_mult": 3.0},
            "pos_embed": {"decay_mult": 1.0},
            "cls_token": {"lr_mult": 4.0},
        },
    )
    expected = {
        # norms and biases: no decay; biases also twice the rate, in the backbone of their layer's
        "neck.1.weight": (LR, 0.0),
        "neck.1.bias": (LR, 0.0),
        "neck.0.bias": (2 * LR, 0.0),
        "backbone.norms.0.weight": (LR, 0.0),
        "backbone.model.blocks.3.norm1.weight": (LR * 0.5, 0.0),
        "backbone.model.blocks.3.mlp.fc1.bias": (2 * LR * 0.5, 0.0),
        # custom keys go before those, and the layer counts on top
        "bbox_head.weight": (10 * LR, DECAY),
        "bbox_head.bias": (10 * LR, DECAY),
        "backbone.model.blocks.2.mlp.fc1.weight": (0.1 * LR * 0.5**2, 3 * DECAY),
        "backbone.model.blocks.2.mlp.fc1.bias": (0.1 * LR * 0.5**2, 3 * DECAY),
        # what the model would exempt is decayed if a key says how much, and only then
        "backbone.model.pos_embed": (LR * 0.5**5, DECAY),
    }
    for name, (lr, weight_decay) in expected.items():
        assert found[name] == (pytest.approx(lr), pytest.approx(weight_decay)), name


def test_without_rules_the_models_exemptions_hold() -> None:
    found = groups(Detector("test_inline_swin"))
    spared = {name for name, (_, weight_decay) in found.items() if not weight_decay}
    assert spared == {name for name in found if name.endswith("bias_table")} != set()
    assert {lr for lr, _ in found.values()} == {LR}


def test_frozen_stages_are_left_out() -> None:
    """And the others learn at the rates that they have without."""
    for model, stages in (("test_ravlt", 4), ("test_inline_deit", 4)):
        whole = groups(Detector(model), layer_decay=0.5)
        for frozen in range(stages + 1):
            detector = Detector(model, frozen_stages=frozen)
            found = groups(detector, layer_decay=0.5)
            trained = {name for name, p in detector.named_parameters() if p.requires_grad}
            assert found == {name: whole[name] for name in trained}, (model, frozen)
            assert len(trained) < len(whole)


def test_mistakes() -> None:
    for value in (0, 1.5, -1):
        with pytest.raises(UserError, match="layer_decay must be in"):
            groups(Detector("test_ravlt"), layer_decay=value)
