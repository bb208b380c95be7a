"""Adding a family takes its own files: nothing else names it.

The two families of `toy_family.py` are put beside those of the package, and then pass what each
model there passes, without a line anywhere else.
"""

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path

import pytest
import timm.models._registry as timm_registry
import torch

from tests.dense import test_padding as padded
from tests.models import test_contract as contract
from tests.peer import timm_peer
from vitlinear import models
from vitlinear.dense.backbone import MultiScaleBackbone
from vitlinear.export.shapes import shortest_side

SOURCE = Path(__file__).with_name("toy_family.py")
MAPS, ROW = "test_new_pyramid", "test_new_row"

TABLES = (dict, set, type(timm_registry._module_to_models))

each_family = pytest.mark.parametrize("name", [MAPS, ROW])


@pytest.fixture(scope="module", autouse=True)
def family(tmp_path_factory):
    """The file among the families; afterwards it was never there."""
    tables = {
        key: value
        for key, value in vars(timm_registry).items()
        if type(value) in TABLES and not key.startswith("__")  # such as __builtins__
    }
    before = {key: copy.deepcopy(value) for key, value in tables.items()}
    folder = tmp_path_factory.mktemp("families")
    shutil.copy(SOURCE, folder)
    models.__path__.append(str(folder))
    models.import_families()
    yield
    models.__path__.remove(str(folder))
    del sys.modules["vitlinear.models.toy_family"], models.toy_family
    for key, value in tables.items():
        value.clear()
        value.update(before[key])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@each_family
def test_is_registered_and_asked(name):
    assert name in models.our_models() and name not in models.our_models(tests=False)
    assert timm_peer.is_token_model(name) == (name == ROW)
    assert shortest_side(name) == 33


@each_family
@pytest.mark.parametrize("size", [(33, 47), (1, 1)])
def test_any_size(name, size):
    contract.test_any_size(name, size)


CHECKS = (
    contract.test_batch_equals_single_images,
    contract.test_channels_last,
    contract.test_backends_agree,
    contract.test_training_and_evaluation_are_deterministic,
    contract.test_gradient_checkpointing_changes_no_gradient,
    contract.test_gradient_checkpointing_of_chosen_stages,
    contract.test_drop_rates_reach_their_modules,
    contract.test_copies,
    contract.test_script,
    contract.test_init_weights_after_to_empty,
    contract.test_every_parameter_learns,
    contract.test_wrong_channel_count_is_named,
    contract.test_layer_decay_covers_every_parameter,
)


@each_family
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_keeps_the_contract(name, check):
    check(name)


@each_family
def test_is_traced(name):
    contract.test_fx_is_bit_equal(name, "eager")


@each_family
def test_gives_maps_of_several_scales(name):
    backbone = MultiScaleBackbone(name).eval()
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(x.shape[2:]) for x in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]


@each_family
def test_leaves_padding_out(name):
    padded.test_padded_image_gives_what_it_gives_alone(name, padded.ODD, torch.float64)
