"""The reference of the benchmark computes what our models compute."""

import pytest
import timm
import torch

from benchmarks.transcription import check_transcribed, transcribe
from tests.golden import relative_error
from vitlinear.errors import UserError


@pytest.mark.parametrize(
    "name",
    ["test_ravlt", "test_ravlt_linear", "test_mavit", "test_mila", "test_h_vittt", "test_pola_pvt"],
)
def test_transcription_is_the_model(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).double()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    model.train()(images)  # statistics that are not those of the start
    for training in (False, True):
        model.train(training)
        theirs = transcribe(model)
        first = (next(x.stem.parameters()) for x in (model, theirs))
        out = model(images), theirs(images)
        grads = (
            torch.autograd.grad(logits.square().sum(), weight)[0]
            for logits, weight in zip(out, first, strict=True)
        )
        assert relative_error(*out) < 1e-11
        assert relative_error(*grads) < 1e-9


def test_sizes_are_those_of_ours():
    with torch.device("meta"):
        model = timm.create_model("mavit_s")
        theirs = transcribe(model)
    assert sum(p.numel() for p in theirs.parameters()) == 27_142_568
    assert theirs(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)


def test_what_has_no_transcription():
    assert check_transcribed("ravlt_t@transcription") == "ravlt_t"
    with pytest.raises(UserError, match="only ravlt_"):
        check_transcribed("l2vit_tiny@transcription")
    for name in ("test_nalaformer", "test_vit"):
        with pytest.raises(TypeError, match="no transcription"):
            transcribe(timm.create_model(name))
