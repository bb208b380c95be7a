"""Training, evaluation and folding in turn, compiled or not: the same numbers everywhere."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import vitlinear  # noqa: F401  registers the models

# As small as they get: two blocks, or one in each stage.
MODELS = {"test_linear_deit": {"depth": 2}, "test_ravlt": {"depths": (1, 1, 1, 1)}}


def several_epochs(name: str, compiled: bool, resumed: bool = False) -> list[Tensor]:
    """Losses of training steps, and logits of the model, its average and a folded copy between.

    Checkpointing goes off, parts are frozen and freed; the last epoch may begin with everything
    made anew from what was saved.
    """

    def made() -> tuple[nn.Module, torch.optim.Optimizer, ModelEmaV3]:
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=5, **MODELS[name]).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
        return model, optimizer, ModelEmaV3(model, decay=0.5)

    def compile_(module: nn.Module) -> nn.Module:
        return torch.compile(module, backend="eager") if compiled else module

    model, optimizer, average = made()
    run, found = compile_(model), []
    generator = torch.Generator().manual_seed(1)
    for epoch in range(3):
        if epoch == 2 and resumed:
            saved = copy.deepcopy([x.state_dict() for x in (model, optimizer, average.module)])
            model, optimizer, average = made()
            for x, state in zip((model, optimizer, average.module), saved, strict=True):
                x.load_state_dict(state)
            run = compile_(model)
        model.set_grad_checkpointing(epoch < 2)
        frozen = (model.stages if hasattr(model, "stages") else model.blocks)[1]
        frozen.requires_grad_(epoch != 1)
        images = torch.randn(4, 3, 64, 64, generator=generator, dtype=torch.float64)
        run.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(run(images), torch.arange(4))
        loss.backward()
        assert all((p.grad is None) == (epoch == 1) for p in frozen.parameters())
        optimizer.step()
        average.update(model)
        run.eval()
        with torch.no_grad():
            logits, folded = run(images), copy.deepcopy(model).eval().fuse()(images)
            found += [loss.detach(), logits, average.module.eval()(images)]
        torch.testing.assert_close(folded, logits, rtol=1e-9, atol=1e-9)
    model.fuse()  # under the program that was compiled of it
    with torch.no_grad():
        torch.testing.assert_close(run(images), logits, rtol=1e-9, atol=1e-9)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_resumed(name):
    whole, resumed = several_epochs(name, False), several_epochs(name, False, resumed=True)
    torch.testing.assert_close(resumed, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.compile
def test_compiled():
    name = "test_linear_deit"
    plain, compiled = several_epochs(name, False), several_epochs(name, True)
    torch.testing.assert_close(compiled, plain, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_folded_model_goes_on_in_either_mode(name):
    """And learns what the plain one would, as far as it has the same parameters."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **MODELS[name]).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    model.fuse()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-4)
    for _ in range(2):
        model.train()
        with torch.enable_grad():
            model(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        logits = model(images)
        exact = copy.deepcopy(model).double()(images.double())
        torch.testing.assert_close(logits.double(), exact, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(logits, expected, rtol=1e-3, atol=1e-4)
