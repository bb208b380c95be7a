"""A training step of whole models: no gradient of a projection is stacked, no memory is added."""

import pytest
import timm
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.saved import saved_bytes
from vitlinear.ops import packed

MODELS = [
    "test_ravlt_linear", "test_nalaformer", "test_inline_swin", "test_inline_cswin",
    "test_lightnet", "test_l2vit", "test_inline_deit", "test_mila",
]  # fmt: skip


def model_and_images(name: str, backend: str) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, attn_backend=backend)
    return model.train(), torch.randn(2, 3, *model.pretrained_cfg["input_size"][-2:])


def gradients(model: torch.nn.Module, images: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """Gradients of all parameters, and how often backward stacked something."""
    torch.manual_seed(1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = model(images).square().sum()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as record:
        grads = torch.autograd.grad(loss, parameters)
    return list(grads), sum(event.name == "aten::stack" for event in record.events())


def unbind(projection: torch.Tensor) -> tuple[torch.Tensor, ...]:
    parts = projection.unbind(2)
    return (*parts, *parts[2:3])


@pytest.mark.parametrize("backend", ["eager", "library"])
@pytest.mark.parametrize("name", MODELS)
def test_training_step(name, backend, monkeypatch):
    model, images = model_and_images(name, backend)
    grads, stacks = gradients(model, images)
    saved = saved_bytes(model, images)
    monkeypatch.setattr(packed, "unpack", unbind)
    expected, before = gradients(model, images)
    torch.testing.assert_close(grads, expected)
    assert saved == saved_bytes(model, images)
    assert stacks == 0 < before
