"""SimpleFeaturePyramid against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitlinear.dense.pyramid import SimpleFeaturePyramid


def deconvolve(x, weight, bias):
    """A 2x2 deconvolution of stride 2: each pixel becomes a square of its own."""
    squares = torch.einsum("bchw,cdij->bdhiwj", x, weight)
    return squares.flatten(4).flatten(2, 3) + bias[:, None, None]


@pytest.mark.quick
def test_levels_by_definition():
    torch.manual_seed(0)
    pyramid = SimpleFeaturePyramid(8).double()
    first, norm, _, second = pyramid.levels["0"]
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 8, 3, 5, dtype=torch.double)
    hidden = deconvolve(x, first.weight, first.bias)
    hidden = F.layer_norm(hidden.permute(0, 2, 3, 1), (4,), norm.weight, norm.bias, 1e-6)
    expected = (
        deconvolve(F.gelu(hidden).permute(0, 3, 1, 2), second.weight, second.bias),
        deconvolve(x, pyramid.levels["1"].weight, pyramid.levels["1"].bias),
        x,
        torch.stack([x[:, :, :2, i : i + 2].amax((2, 3)) for i in (0, 2, 4)], dim=2),
    )
    maps = pyramid(x)
    for i in range(3):
        torch.testing.assert_close(maps[i], expected[i])
    assert maps[3].shape == (2, 8, 2, 3)  # the odd row and column have a pixel of their own
    torch.testing.assert_close(maps[3][:, :, 0], expected[3])
    assert pyramid.channels == tuple(y.shape[1] for y in maps) == (2, 4, 8, 8)
    assert pyramid.scales == (0.25, 0.5, 1, 2)


def test_levels_that_are_not_asked_for_are_not_made():
    pyramid = SimpleFeaturePyramid(8, out_indices=(1, 3))
    assert {key.split(".")[1] for key in pyramid.state_dict()} == {"1"}
    assert [y.shape[-1] for y in pyramid(torch.ones(1, 8, 1, 1))] == [2, 1]
    assert pyramid.channels == (4, 8) and pyramid.scales == (0.5, 2)


@pytest.mark.parametrize("dim, levels", [(6, (0, 1)), (0, (0,)), (8, (4,)), (8, (-1,))])
def test_what_cannot_be_made(dim, levels):
    with pytest.raises(ValueError):
        SimpleFeaturePyramid(dim, levels)
