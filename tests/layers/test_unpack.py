"""A training step of whole models: no gradient of a projection is stacked, no memory is added."""

from collections import Counter

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.copies import unbind
from benchmarks.saved import saved_bytes
from tests.models.test_contract import TEST_MODELS
from tests.pairwise import pairwise, some_by_night
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


@pairwise(every=2, name=TEST_MODELS, backend=["eager", "library"])
def test_training_step(name, backend, monkeypatch):
    model, images = model_and_images(name, backend)
    grads, stacking = gradients(model, images)
    saved = saved_bytes(model, images)
    monkeypatch.setattr(packed, "unpack", unbind)
    expected, before = gradients(model, images)
    torch.testing.assert_close(grads, expected)
    assert saved == saved_bytes(model, images)
    assert stacking == 0 < before


# What is copied and joined within the attention's own steps when kernels do the rest: by forward
# and backward of attention, states and reads, and on the way to the gradient of the projection.
COPIED = {
    # The gate of the norm is no part of the attention: its gradient goes to its place.
    "test_nalaformer": 2, "test_nalaformer_linear": 5,
    # A learned state that all samples share, for each of them, and its gradient; not tokens.
    "test_vittt": 8, "test_h_vittt": 10,
    # Numbers of valid tokens of windows that the map does not fill.
    "test_pola_swin": 4,
}  # fmt: skip
# Gradients of softmax attention, and of what a layer changes before it attends, have memory of
# their own: they are joined, once for a layer.
JOINED = {
    "test_h_vittt": 5, "test_inline_cswin": 5, "test_inline_swin": 3, "test_l2vit": 5,
    "test_mavit": 3, "test_nalaformer": 3, "test_pola_pvt": 5, "test_pola_swin": 6,
    "test_ravlt": 3, "test_vittt": 4,
}  # fmt: skip
OWN = ("_LinearAttention", "_Unpack", "_State", "_Read", "UnbindBackward")
# The others are of the same families as one of these.
EVERY_RUN = {
    "test_inline_deit", "test_inline_pvt", "test_lightnet", "test_linear_deit", "test_mila",
    "test_nalaformer_linear", "test_pola_pvt", "test_ravlt_linear", "test_vittt",
}  # fmt: skip


@some_by_night("name", TEST_MODELS, EVERY_RUN)
def test_copies_of_a_training_step(name):
    """With kernels that do nothing: of what is launched, all is there."""
    pytest.importorskip("triton")
    from benchmarks.host_cost import without_launches
    from vitlinear.ops.triton import INTERPRETING

    if INTERPRETING:
        pytest.skip("the interpreter launches nothing")
    model, images = model_and_images(name, "triton")
    parameters = [p for p in model.parameters() if p.requires_grad]
    profiler = profile(activities=[ProfilerActivity.CPU], acc_events=True)
    with without_launches() as launched, profiler as record:
        torch.autograd.grad(model(images).square().sum(), parameters, allow_unused=True)
    found = Counter()
    for event in record.events():
        above = event
        while above is not None and not above.name.startswith(OWN):
            above = above.cpu_parent
        if above is not None:
            found[event.name] += 1
    assert launched.names and found["aten::stack"] == 0
    assert found["aten::copy_"] == COPIED.get(name, 0)
    assert found["aten::cat"] == JOINED.get(name, 0)
