"""Layers call the modules inside them: hooks run, and other weights and modules are used."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from tests.models.test_fuse import TEST_MODELS
from tests.pairwise import siblings_by_night
from vitlinear.layers import (
    CeilConv,
    CrossShapedAttention,
    DynamicConv,
    Linear,
    ShiftedWindowAttention,
    use_pytorch_layers,
)
from vitlinear.layers.conv.dynamic_conv import TokenConv


@pytest.mark.parametrize("training", [False, True])
@siblings_by_night(TEST_MODELS)
def test_every_module_is_called(name, training):
    model, called = timm.create_model(name).train(training), set()
    leaves = {name: module for name, module in model.named_modules() if not list(module.children())}
    for key, module in leaves.items():
        module.register_forward_hook(lambda *args, key=key: called.add(key))
    model(torch.randn(2, 3, 64, 64))
    # Without learned positions there is nothing to add.
    assert leaves.keys() - called <= {"add_positions"}
    assert ("add_positions" in called) == (getattr(model, "pos_embed", None) is not None)


class Lora(nn.Module):
    """A convolution with an update beside it, of the same class and made with its constructor."""

    def __init__(self, base: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__()
        self.base, kind = base, type(base)
        place = (base.stride, base.padding)
        self.a = kind(base.in_channels, 2, base.kernel_size, *place, bias=False)
        self.b = kind(2, base.out_channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.b(self.a(x))


def test_lora_of_dynamic_convolutions_learns():
    layer, x = DynamicConv(8, 2), torch.randn(3, 4, 4, 8)
    layer.fc1, layer.fc2 = Lora(layer.fc1), Lora(layer.fc2)
    layer(x, x.mean((1, 2))).square().sum().backward()
    assert all(parameter.grad.any() for parameter in layer.parameters())


@pytest.mark.parametrize("arguments", [(2, 2), (3, 2, 1), (7, 4, 3), ((3, 1), (2, 1))])
def test_lora_of_convolutions_that_round_up(arguments):
    """Its layers cover the same places, as many as there are."""
    layer, x = Lora(CeilConv(3, 4, *arguments)), torch.randn(2, 3, 9, 7)
    out = layer(x)
    down, right = layer.base.stride
    assert out.shape == (2, 4, -(-9 // down), -(-7 // right))
    weight = torch.einsum("or,rihw->oihw", layer.b.weight[:, :, 0, 0], layer.a.weight)
    with torch.no_grad():
        layer.base.weight += weight
    torch.testing.assert_close(layer.base(x), out)


@siblings_by_night(TEST_MODELS)
@torch.no_grad()
def test_layers_of_pytorch(name):
    model, images = timm.create_model(name).eval(), torch.randn(2, 3, 64, 64)
    expected, keys = model(images), list(model.state_dict())
    kept = model.get_classifier().weight
    assert use_pytorch_layers(model) is model
    assert not any(isinstance(module, Linear | TokenConv) for module in model.modules())
    assert list(model.state_dict()) == keys and model.get_classifier().weight is kept
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
@torch.no_grad()
def test_dynamic_quantisation():
    model, images = timm.create_model("test_linear_deit").eval(), torch.randn(2, 3, 64, 64)
    number = sum(isinstance(module, nn.Linear) for module in model.modules())
    expected = model(images)
    quantised = quantize_dynamic(use_pytorch_layers(model), {nn.Linear})
    layers = [m for m in quantised.modules() if isinstance(m, nn.quantized.dynamic.Linear)]
    assert len(layers) == number
    assert (quantised(images) - expected).norm() < 0.1 * expected.norm()


def test_layers_that_stay_ours():
    model = timm.create_model("test_ravlt").eval()
    hooked = model.stages[0].blocks[0].mlp.fc1
    hooked.register_forward_hook(lambda *args: None)
    use_pytorch_layers(model)
    assert model.stages[0].blocks[0].mlp.fc1 is hooked
    with pytest.raises(ValueError, match=r"call use_pytorch_layers before fuse\(\)"):
        use_pytorch_layers(timm.create_model("test_ravlt").eval().fuse())


# Of every layer that does more with the modules inside than to call them, or did.
LAYERS = {
    "DynamicConv": (lambda: DynamicConv(8, 2), lambda x: (x, x.mean((1, 2)))),
    "CrossShapedAttention": (lambda: CrossShapedAttention(8, 2, "inline", 2), lambda x: (x, x)),
    "ShiftedWindowAttention": (lambda: ShiftedWindowAttention(8, 2, 3, True), lambda x: (x,)),
}
TABLE = "relative_position_bias_table"


CHANGES = {
    "pruned": lambda module, key: prune.random_unstructured(module, key, 0.5),
    "norm": parametrizations.weight_norm,
    "old norm": weight_norm,
    "spectral": parametrizations.spectral_norm,
    "old spectral": spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", LAYERS)
def test_weights_that_are_made_for_each_call(name, change):
    torch.manual_seed(0)
    make, arguments = LAYERS[name]
    layer, other, x = make().double(), make().double(), torch.randn(2, 5, 5, 8).double()
    changed = [
        (path, module, key)
        for path, module in layer.named_modules()
        for key in ("weight", TABLE)
        if key in module._parameters
    ]
    for _, module, key in changed:
        CHANGES[change](module, key)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    for _ in range(2):  # each with a graph of its own
        layer.zero_grad()
        out = layer(*arguments(x))
        out.square().sum().backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())
    layer.eval()  # in which spectral norms stay
    out = layer(*arguments(x))
    state = {key: value for key, value in layer.state_dict().items() if key in other.state_dict()}
    state |= {f"{path}.{key}": getattr(module, key) for path, module, key in changed}
    other.load_state_dict(state)
    torch.testing.assert_close(out, other.eval()(*arguments(x)))


@pytest.mark.compile
@pytest.mark.slow
def test_hooks_in_compiled_stripes():
    torch.manual_seed(0)
    layer, x = CrossShapedAttention(8, 2, "inline", 2), torch.randn(2, 5, 5, 8)
    plain = layer(x, x)
    for module in layer.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            module.register_forward_hook(lambda module, args, out: 2 * out)
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    expected = layer(x, x)
    assert not torch.allclose(plain, expected)
    torch.testing.assert_close(compiled(x, x), expected)
