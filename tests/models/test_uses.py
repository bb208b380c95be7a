"""Uses of timm's models that need more than their suite asks: bad arguments, sizes, tracing."""

from __future__ import annotations

import io

import pytest
import timm
import torch
from timm.models import model_parameters, save_for_hf
from torch import nn

from tests.models.test_contract import TEST_MODELS, make
from tests.pairwise import siblings_by_night, some_by_night
from vitlinear.checkpoints.translate import source_grid
from vitlinear.models._isotropic import IsotropicBackbone

STAGED = [
    name
    for name in TEST_MODELS
    if not isinstance(timm.create_model(name, device="meta"), IsotropicBackbone)
]
each_model = siblings_by_night(TEST_MODELS)


@each_model
def test_the_classifier_is_last(name):
    """timm's clipping leaves the last two parameters out for that reason."""
    model = timm.create_model(name, device="meta")
    own = {id(x) for x in model.get_classifier().parameters()}
    others = {id(x) for x in model_parameters(model, exclude_head=True)}
    assert own and not own & others
    assert len(own | others) == len(list(model.parameters()))


@pytest.mark.parametrize("bad", [-1, 3.5, True, "many"])
@pytest.mark.parametrize("name", ["test_linear_deit", "test_ravlt"])
def test_a_number_of_classes_that_is_none(name, bad):
    model = make(name)
    with pytest.raises(ValueError, match="num_classes must be a whole number, 0 or more"):
        model.reset_classifier(bad)
    assert model.num_classes == 7 and model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    with pytest.raises(ValueError, match="num_classes must be"):
        timm.create_model(name, num_classes=bad)


@some_by_night("name", TEST_MODELS, ("test_linear_deit", "test_pola_swin", "test_ravlt"))
def test_trace_with_gradients(name):
    """torch checks a trace by another one without gradients: the program is the same."""
    model, x = make(name), torch.randn(1, 3, 64, 64)
    traced = torch.jit.trace(model, x)
    torch.jit.save(traced, file := io.BytesIO())
    file.seek(0)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(torch.jit.load(file)(x), model(x), rtol=1e-4, atol=1e-5)


# Where positions come from, and where they go.
SIZES = [((128, 96), (96, 128)), ((48, 192), (96, 96)), ((128, 96), (96, 96))]


@pytest.mark.parametrize(("source", "target"), SIZES)
@pytest.mark.parametrize("name", ["test_linear_deit", "test_inline_pvt", "test_pola_pvt"])
def test_positions_of_grids_that_are_not_square(name, source, target, tmp_path):
    """As those of the model itself, which resizes them for each image."""
    model = timm.create_model(name, img_size=source).eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    hub = f"local-dir:{tmp_path}"
    again = timm.create_model(hub, pretrained=True, img_size=target).eval()
    x = torch.randn(1, 3, *target)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=1e-3, atol=1e-4)


def test_source_grids():
    assert source_grid(48, (128, 96)) == (8, 6) and source_grid(48) is None
    assert source_grid(36, (48, 192)) == (3, 12) and source_grid(36) == (6, 6)
    assert source_grid(49, 100) == (7, 7) and source_grid(50, 224) is None


@pytest.mark.parametrize("size", [100, (5, 40), (96, 33)])
@pytest.mark.parametrize("name", ["test_linear_deit", "test_inline_deit"])
def test_positions_are_as_many_as_tokens(name, size):
    height, width = (size, size) if isinstance(size, int) else size
    model = timm.create_model(name, img_size=size)
    grid = -(-height // 16), -(-width // 16)
    assert model.patch_embed.grid_size == grid
    assert model.embed(torch.zeros(1, 3, height, width))[1:] == grid
    model.set_input_size(64)
    model.set_input_size(size)
    assert model.pos_embed.shape[1] == 1 + grid[0] * grid[1]
    assert model(torch.zeros(1, 3, height, width)).shape == (1, 1000)


@pytest.mark.parametrize("name", STAGED)
def test_pruning_takes_what_it_is_told(name):
    x = torch.randn(1, 3, 64, 64)
    model = make(name)
    projects, features, logits = model.projects(), model.forward_features(x), model(x)
    model.prune_intermediate_layers(1, prune_norm=False, prune_head=False)
    assert torch.equal(model(x), logits)
    model.prune_intermediate_layers(1)
    assert model.num_classes == 0
    assert torch.equal(model(x), model.forward_features(x))  # not pooled, as of timm's hosts
    if not projects:
        assert torch.equal(model.forward_features(x), features)
    model.reset_classifier(10, global_pool="avg")
    assert model(x).shape == (1, 10)
    pruned = make(name)
    pruned.prune_intermediate_layers(1, prune_norm=True, prune_head=False)
    assert isinstance(pruned.final, nn.Identity)
    assert pruned(x).shape[1] == (7 if name in KEEPING else pruned.num_features)


# Their last map goes to the classifier through a norm, if through anything.
KEEPING = [name for name in STAGED if not timm.create_model(name, device="meta").projects()]


@pytest.mark.parametrize("name", KEEPING)
def test_the_norm_of_the_last_map(name):
    model, x = make(name), torch.randn(1, 3, 64, 64)
    (last,) = model.forward_intermediates(x, [-1], norm=True, intermediates_only=True)
    assert torch.equal(last, model.forward_features(x))


OUT_INDICES = {
    (3, 1): "must ascend",
    (-1, -2): "must ascend",
    (2, 2): "must ascend",
    (): "must ascend",
    -1: "1 at least",
    0: "1 at least",
}


@pytest.mark.parametrize("given", OUT_INDICES, ids=str)
@pytest.mark.parametrize("name", ["test_linear_deit", "test_ravlt"])
def test_levels_that_timm_takes_for_others(name, given):
    with pytest.raises(ValueError, match=f"out_indices.*{OUT_INDICES[given]}"):
        timm.create_model(name, features_only=True, out_indices=given, device="meta")
    with pytest.raises(ValueError, match=f"out_indices.*{OUT_INDICES[given]}"):
        options = {"feature_cfg": {"out_indices": given}}
        timm.create_model(name, features_only=True, device="meta", **options)


def test_a_feature_cfg_is_added_to_that_of_the_model():
    some = {"features_only": True, "feature_cfg": {"out_indices": (1, 2)}, "device": "meta"}
    whole = timm.create_model("test_ravlt", features_only=True, device="meta")
    assert (
        timm.create_model("test_ravlt", **some).feature_info.channels()
        == (whole.feature_info.channels()[1:3])
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_take_names(checkpointing):
    model = make("test_linear_deit")
    model.set_grad_checkpointing(checkpointing)
    tokens = torch.randn(1, 5, 64)
    assert torch.equal(model.blocks[0](tokens, height=2, width=2), model.blocks[0](tokens, 2, 2))


@pytest.mark.parametrize("name", ["test_inline_swin", "test_pola_swin"])
def test_weights_that_are_assigned_to_a_model_on_meta(name):
    trained, x = make(name), torch.randn(1, 3, 64, 64)
    model = make(name, device="meta")
    model.load_state_dict(trained.state_dict(), assign=True)
    assert torch.equal(model(x), trained(x))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("test_ravlt", {"depths": (1, 1, -1, 1)}, "depths must be 0 or more"),
        ("test_ravlt", {"head_width": 0}, "at least one channel"),
        ("test_linear_deit", {"patch_size": 0}, "at least one pixel"),
        ("test_vittt", {"patch_size": 0}, "at least one pixel"),
    ],
)
def test_arguments_that_make_no_model(name, options, says):
    with pytest.raises(ValueError, match=says):
        timm.create_model(name, **options)


def test_patches_that_are_not_square():
    model = timm.create_model("test_linear_deit", patch_size=(16, 8), features_only=True)
    assert model.feature_info.reduction() == [16, 16, 16]
