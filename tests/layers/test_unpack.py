"""A training step of whole models: no gradient of a projection is stacked, no memory is added."""

import pytest
import timm
import torch
from torch import Tensor, nn

from benchmarks.saved import saved_bytes
from tests.models.test_contract import TEST_MODELS
from vitlinear.ops import packed


def model_and_images(name: str, backend: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, attn_backend=backend)
    return model.train(), torch.randn(2, 3, *model.pretrained_cfg["input_size"][-2:])


def gradients(model: nn.Module, images: Tensor) -> tuple[list[Tensor], int]:
    """Gradients of all parameters, and how many steps of backward stack something."""
    torch.manual_seed(1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = model(images).square().sum()
    nodes, ahead = {loss.grad_fn}, [loss.grad_fn]
    while ahead:
        for node, _ in ahead.pop().next_functions:
            if node is not None and node not in nodes:
                nodes.add(node)
                ahead.append(node)
    stacking = sum(node.name() == "UnbindBackward0" for node in nodes)
    return list(torch.autograd.grad(loss, parameters)), stacking


def unbind(projection: Tensor) -> tuple[Tensor, ...]:
    parts = projection.unbind(2)
    return (*parts, *parts[2:3])


@pytest.mark.parametrize("backend", ["eager", "library"])
@pytest.mark.parametrize("name", TEST_MODELS)
def test_training_step(name, backend, monkeypatch):
    model, images = model_and_images(name, backend)
    grads, stacking = gradients(model, images)
    saved = saved_bytes(model, images)
    monkeypatch.setattr(packed, "unpack", unbind)
    expected, before = gradients(model, images)
    torch.testing.assert_close(grads, expected)
    assert saved == saved_bytes(model, images)
    assert stacking == 0 < before
