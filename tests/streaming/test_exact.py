"""Streamed outputs are those of the model on the whole image, whatever the bands."""

import pytest
import timm
import torch
from torch import Tensor, nn

import vitlinear
from tests.as_trained import make
from tests.pairwise import pairwise
from vitlinear.models._contract import TimmBackbone
from vitlinear.models._stages import StagedBackbone
from vitlinear.streaming import run

pytestmark = pytest.mark.usefixtures("all_memory_free")

# Even, odd and uneven at every stride; smaller than a window; large enough for several windows of
# every kind, shifted ones that hold both ends of the map among them.
SIZES = [(96, 128), (203, 97), (33, 64), (176, 104), (5, 7)]
MODELS = sorted(
    name
    for name in timm.list_models("test_*")
    if timm.models.model_entrypoint(name).__module__.startswith("vitlinear.")
)


def difference(a: Tensor, b: Tensor) -> float:
    """The largest, over the largest value."""
    assert a.shape == b.shape and a.dtype == b.dtype
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
def check(model: nn.Module, size: tuple[int, int], **kwargs: object) -> None:
    """Compare every output with that of the whole image."""
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    maps = model.forward_intermediates(image, intermediates_only=True)
    whole = {"logits": model(image), "features": model.forward_features(image)}
    whole.update(enumerate(maps))
    streamed = vitlinear.stream(model, image[0], output=list(whole), **kwargs)
    assert {name: difference(streamed[name], x) for name, x in whole.items()} == pytest.approx(
        dict.fromkeys(whole, 0), abs=1e-10
    )


@pairwise(every=4, name=MODELS, size=SIZES, band_rows=(1, 3, 8, 1000))
def test_equals_the_whole_image(name, size, band_rows):
    check(make(name), size, band_rows=band_rows)


@pytest.mark.parametrize("pool", ["max", "avgmax", ""])
@pytest.mark.parametrize("name", ["test_ravlt_linear", "test_linear_deit"])
def test_every_pooling(name, pool):
    check(make(name, global_pool=pool), (97, 64), band_rows=2)


@pytest.mark.quick
@pytest.mark.parametrize("kwargs", [{"bidirectional": True}, {"attn_backend": "library"}])
def test_variants(kwargs):
    check(make("test_lightnet", **kwargs), (203, 97), band_rows=3)


@pytest.mark.parametrize("name", ["test_ravlt_linear", "test_nalaformer_linear"])
def test_later_passes_find_what_earlier_ones_made(name, monkeypatch):
    choose = run.Runner.choose_cuts

    def choose_and_keep(self, plans, wanted):
        self.keeping = set(range(len(plans)))
        return choose(self, plans, wanted)

    monkeypatch.setattr(run.Runner, "choose_cuts", choose_and_keep)
    check(make(name), (97, 64), band_rows=2)


def test_fused_model():
    check(make("test_l2vit").fuse(), (97, 64), band_rows=2)


def test_work_directory(tmp_path):
    check(make("test_ravlt"), (203, 97), band_rows=3, workdir=tmp_path)
    check(make("test_linear_deit"), (203, 97), band_rows=3, workdir=tmp_path / "deeper")


@torch.no_grad()
def test_single_precision():
    model = make("test_mavit_linear").float()
    image = torch.randn(1, 3, 160, 128)
    assert difference(vitlinear.stream(model, image[0], band_rows=4), model(image)) < 1e-5


def test_skeletons_are_known():
    # A third skeleton would have steps of its own.
    for name in MODELS:
        model = timm.create_model(name)
        assert isinstance(model, TimmBackbone)
        assert isinstance(model, StagedBackbone) or hasattr(model, "make_blocks")
