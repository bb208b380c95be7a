"""Outputs made of maps: masks, principal components, heads."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import vitlinear
from vitlinear.errors import UserError
from vitlinear.streaming import PCA, Head
from vitlinear.streaming.tissue import CELL

pytestmark = pytest.mark.usefixtures("all_memory_free")

PIXELS = np.random.default_rng(0).integers(0, 256, (192, 96, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("test_ravlt_linear").double().eval()


@pytest.fixture(scope="module")
def maps(model):
    return vitlinear.stream(model, PIXELS, output=[0, 1, 2, 3, "features"])


class PyramidHead(nn.Module):
    """Maps of several scales brought to the finest, as segmentors do."""

    def __init__(self, channels):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(width, 8, 1) for width in channels)
        self.smooth = nn.Conv2d(8, 5, 3, padding=1)

    def forward(self, maps):
        parts = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        size = parts[0].shape[2:]
        bilinear = [F.interpolate(x, size=size, mode="bilinear") for x in parts]
        return self.smooth(sum(bilinear))


@pytest.mark.parametrize("of", [1, (0, 1, 2, 3)])
def test_heads_give_the_map_of_the_whole(of, model, maps, tmp_path):
    torch.manual_seed(1)
    if of == 1:
        module = nn.Sequential(nn.Conv2d(48, 8, 5, padding=2), nn.GELU(), nn.Conv2d(8, 3, 1))
        given = maps[1]
    else:
        module, given = PyramidHead([24, 48, 64, 96]), [maps[i] for i in of]
    head = Head(module.double().eval(), of)
    with torch.no_grad():
        expected = module(given)
    streamed = vitlinear.stream(model, PIXELS, output=head, band_rows=3)
    assert torch.allclose(streamed, expected, atol=1e-12)
    vitlinear.stream(model, PIXELS, tmp_path / "logits.npy", output=head)
    assert np.allclose(np.load(tmp_path / "logits.npy"), expected[0], atol=1e-12)


class WithPositions(nn.Module):
    def forward(self, x):
        return x + torch.arange(x.shape[2])[:, None]


@pytest.mark.parametrize(
    ("module", "of", "message"),
    [
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Upsample((24, 8))), 1, "looks at .* rows"),
        (nn.Conv2d(48, 2, 3, stride=2, padding=1), 1, "a whole number of rows"),
        (WithPositions(), 1, "other values on bands"),
        (nn.Flatten(), 1, "must give a map"),
        (nn.Dropout(), 1, "training mode"),
        (nn.Identity(), 9, "has no output 9"),
        (nn.Conv2d(64, 2, 1), 1, "the head .Conv2d. does not take .* map 1 of 48 channels"),
    ],
)
def test_heads_that_cannot_be_streamed(module, of, message, model, monkeypatch):
    monkeypatch.setattr("vitlinear.streaming.run.Runner.run", None)  # said before anything runs
    module = module.double() if isinstance(module, nn.Dropout) else module.double().eval()
    with pytest.raises(UserError, match=message):
        vitlinear.stream(model, PIXELS, output=Head(module, of))


def test_maps_of_several_scales_have_to_fit(model):
    module = PyramidHead([24, 48, 64, 96]).double().eval()
    with pytest.raises(UserError, match="pad or crop the image"):
        vitlinear.stream(model, PIXELS[:180], output=Head(module, (0, 1, 2, 3)))


def test_principal_components(model, maps, tmp_path):
    streamed = vitlinear.stream(model, PIXELS, output=[PCA(1), 1], band_rows=2)
    image = streamed[PCA(1)]
    assert image.shape == (1, 3, 24, 12) and image.dtype == torch.uint8
    x = maps[1][0].flatten(1).T
    x = x - x.mean(0)
    _, values, vectors = torch.linalg.svd(x, full_matrices=False)
    first = vectors[0] * vectors[0][vectors[0].abs().argmax()].sign()
    expected = 255 * (0.5 + x @ first / (6 * values[0] / len(x) ** 0.5))
    assert (image[0, 0].flatten() - expected.clamp(0, 255)).abs().max() <= 1
    with pytest.raises(UserError, match="the mask leaves no place"):
        vitlinear.stream(model, PIXELS, output=PCA(1), mask=np.zeros((4, 4), bool))


def slide():
    """A white slide with a pink piece of tissue in rows 64 to 128 and columns 32 to 96."""
    pixels = np.full((190, 100, 3), 240, np.uint8)
    pixels[64:128, 32:96] = (200, 120, 180)
    return pixels + np.random.default_rng(0).integers(0, 8, pixels.shape, dtype=np.uint8)


def test_tissue_is_kept_and_is_what_it_is_without_a_mask(model, tmp_path):
    whole = vitlinear.stream(model, slide(), output=1)
    kept = vitlinear.stream(model, slide(), output=1, mask="tissue", band_rows=5)
    inside = torch.zeros(kept.shape[2:], dtype=torch.bool)
    inside[64 // 8 : 128 // 8, 32 // 8 : 96 // 8] = True
    assert torch.equal(~kept.isnan().any(1)[0], inside)
    assert torch.allclose(kept[:, :, inside], whole[:, :, inside], atol=1e-12)
    path = tmp_path / "map.npy"
    vitlinear.stream(model, slide(), path, output=1, mask=np.eye(4, dtype=bool), band_rows=5)
    assert 0.2 < np.isnan(np.load(path)[0]).mean() < 0.8


def test_cells_are_in_their_places(model):
    # The last cells are cut short: 190 is no multiple of 32.
    cells = np.zeros((-(-190 // CELL), 4), bool)
    kept = vitlinear.stream(model, slide(), output=0, mask="tissue")
    rows = (~kept.isnan().all(1)[0]).any(1).nonzero().flatten()
    assert (int(rows[0]), int(rows[-1])) == (64 // 4, 128 // 4 - 1) and len(cells) == 6


@pytest.mark.parametrize(
    ("mask", "message"),
    [("cells", "no mask 'cells'"), (np.ones((2, 2)), "truth values"), (np.ones(3, bool), "h, w")],
)
def test_masks_that_are_none(mask, message, model):
    with pytest.raises(UserError, match=message):
        vitlinear.stream(model, PIXELS, output=1, mask=mask)


def test_masks_need_maps_and_pixels(model):
    with pytest.raises(UserError, match="logits come of all places"):
        vitlinear.stream(model, PIXELS, mask="tissue")
    with pytest.raises(UserError, match="mask='valid' needs a raster"):
        vitlinear.stream(model, PIXELS, output=1, mask="valid")
    with pytest.raises(UserError, match="needs pixels"):
        vitlinear.stream(model, PIXELS / 255, output=1, mask="tissue")
