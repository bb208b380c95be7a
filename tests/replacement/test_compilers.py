"""torch.compile, torch.export, torch.fx and TorchScript take what they take of timm's models."""

from __future__ import annotations

import io

import pytest
import torch
from timm.layers import set_scriptable
from timm.models import create_feature_extractor

from tests.replacement.zoo import FAMILIES
from vitlinear import replace_attention

nightly = pytest.mark.nightly
CASES = [
    # One block of each kind in the ordinary run: compilers are slow.
    ("dinov3", "mala", {}),
    *(
        pytest.param(*case, marks=[nightly, pytest.mark.slow])
        for case in (
            ("swin", "mala", {}),
            ("vit, gated and normed", "mila", {"rope": True}),
            ("sapiens2", "mala", {}),
            ("naflexvit", "rala", {}),
        )
    ),
]
of_cases = pytest.mark.parametrize(("family", "attention", "arguments"), CASES)


def replaced(family, attention, arguments, **kwargs):
    small = FAMILIES[family]
    if "depth" in small.kwargs:
        kwargs["depth"] = 1
    with set_scriptable(True):
        model = small.create(**kwargs)
    replace_attention(model, attention, "-1:", small.keep, **arguments)
    torch.manual_seed(0)
    return model, small.images()


@of_cases
@torch.no_grad()
def test_export(family, attention, arguments):
    model, x = replaced(family, attention, arguments)
    batch = torch.export.Dim("batch", max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    x = torch.cat((x, x.flip(0), x[:1]))
    torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-4)


@of_cases
@nightly
@pytest.mark.compile
def test_compile_without_a_break(family, attention, arguments):
    model, x = replaced(family, attention, arguments)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.compile
@nightly
@pytest.mark.slow
def test_compile_at_sizes_that_change():
    model, x = replaced("vit, registers", "mila", {"rope": True}, dynamic_img_size=True)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for part in (x, x[..., :48, :], x[..., :32]):
        with torch.no_grad():
            torch.testing.assert_close(compiled(part), model(part), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "attention", "arguments"),
    [
        ("vit, registers", "mila", {"rope": True}),  # whose maps may be of any size
        ("swin", "mala", {}),
        ("dinov3", "l2", {}),
        pytest.param("beit", "mala", {}, marks=nightly),
    ],
)
@torch.no_grad()
def test_fx(family, attention, arguments):
    model, x = replaced(family, attention, arguments)
    traced = create_feature_extractor(model, ["head"])
    wide = torch.cat((x, x), dim=3) if "vit, r" in family else x
    for images in (x, wide):
        (out,) = traced(images).values()
        assert torch.equal(out, model(images))


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("dinov3", "l2"),
        pytest.param("swin", "mala", marks=nightly),
        pytest.param("vit, registers", "mala", marks=nightly),
        pytest.param("sapiens2", "polaformer", marks=nightly),
        pytest.param("beit", "mala", marks=nightly),
        pytest.param("relpos", "softmax", marks=nightly),
        pytest.param("sam", "mala", marks=nightly),
    ],
)
def test_torchscript(family, attention):
    model, x = replaced(family, attention, {})
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), model(x), rtol=1e-4, atol=1e-4)


def test_torchscript_says_what_it_cannot_compile():
    model, _ = replaced("vit, registers", "mila", {})
    with pytest.raises(ValueError, match="TorchScript cannot compile mila"):
        torch.jit.script(model)
    model, _ = replaced("vit, registers", "mala", {"rope": True})
    with pytest.raises(ValueError, match="TorchScript cannot compile rope=True"):
        torch.jit.script(model)
