"""Folding of models that somebody has changed: what is not plain stays, and so do outputs."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, LayerNorm2d, LayerScale
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torchvision.ops import FrozenBatchNorm2d

from tests.models.test_fuse import TEST_MODELS, trained
from vitlinear.layers import ConvMlp, ConvNormAct, DepthwiseConv, Linear, Mlp, is_plain

# Among them they have every module that folds.
MODELS = ["test_nalaformer", "test_l2vit"]


def small(name: str) -> nn.Module:
    """The model of `trained` with weights far from zero, and one block where one is enough."""
    model = trained(name)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def places(model: nn.Module, *kinds: type[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every module of these classes, with its parent and its name there."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in kinds:
                yield parent, name, child


def put(kind: type[nn.Module], make: Callable[[nn.Module], nn.Module]) -> Callable:
    """A change: something else in the place of every module of a class."""

    def change(model: nn.Module) -> None:
        for parent, name, child in places(model, kind):
            setattr(parent, name, make(child).to(torch.float64))

    return change


def do(act: Callable[[nn.Module], object], *kinds: type[nn.Module]) -> Callable:
    """A change: something done to every module of these classes."""

    def change(model: nn.Module) -> None:
        for _, _, child in places(model, *kinds):
            act(child)

    return change


def torch_linear(layer: Linear) -> nn.Linear:
    """PyTorch's layer with the same weights."""
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    plain.load_state_dict(layer.state_dict())
    return plain


class Lora(nn.Module):
    """A linear layer with an update of low rank beside it, not merged."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, 2, bias=False)
        self.b = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.b(self.a(x))


class SeeThroughLora(Lora):
    """One that answers for the layer that it wraps."""

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class LoraSubclass(Linear):
    """A subclass of the layer, as some tools make them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def lora_subclass(layer: Linear) -> LoraSubclass:
    ours = LoraSubclass(layer.in_features, layer.out_features, layer.bias is not None)
    ours.load_state_dict(layer.state_dict())
    return ours


class Swish(nn.GELU):
    """An activation that says that it is a GELU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x)


class SquaredScale(LayerScale):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma.square()


def with_forward(module: nn.Module) -> None:
    """Its class's forward, doubled, as the module's own."""
    forward = type(module).forward
    module.forward = types.MethodType(lambda self, *args: 2 * forward(self, *args), module)


def without_statistics(bn: nn.BatchNorm2d) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(bn.num_features, track_running_stats=False).eval()


def frozen(bn: nn.BatchNorm2d) -> nn.Module:
    """In training mode, which means nothing to it."""
    frozen = FrozenBatchNorm2d(bn.num_features).train()
    frozen.load_state_dict({k: v for k, v in bn.state_dict().items() if "num" not in k})
    return frozen


def norm_with_activation(bn: nn.BatchNorm2d) -> nn.Module:
    norm = BatchNormAct2d(bn.num_features).eval()
    norm.load_state_dict(bn.state_dict())
    return norm


def weight_as_a_tensor(layer: Linear) -> None:
    """As networks have it whose weights another network makes."""
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight


WEIGHTS = (Linear, nn.Conv2d, DepthwiseConv)
CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "nn.Linear": put(Linear, torch_linear),
    "nn.Sequential": put(Linear, lambda layer: nn.Sequential(layer, nn.Dropout()).eval()),
    "LoRA": put(Linear, Lora),
    "LoRA that is seen through": put(Linear, SeeThroughLora),
    "LoRA by subclass": put(Linear, lora_subclass),
    "GELU by tanh": put(nn.GELU, lambda act: nn.GELU("tanh")),
    "subclass of GELU": put(nn.GELU, lambda act: Swish()),
    "no activation": put(nn.GELU, lambda act: nn.Identity()),
    "subclass of LayerScale": put(LayerScale, lambda scale: SquaredScale(len(scale.gamma), 0.5)),
    "scales by a linear layer": put(
        LayerScale, lambda scale: nn.Linear(len(scale.gamma), len(scale.gamma))
    ),
    "other dropout": put(nn.Dropout, lambda drop: nn.Tanh()),
    "norm with activation": put(nn.BatchNorm2d, norm_with_activation),
    "GroupNorm": put(nn.BatchNorm2d, lambda bn: nn.GroupNorm(1, bn.num_features)),
    "LayerNorm2d": put(nn.BatchNorm2d, lambda bn: LayerNorm2d(bn.num_features)),
    "no norm": put(nn.BatchNorm2d, lambda bn: nn.Identity()),
    "norm without statistics": put(nn.BatchNorm2d, without_statistics),
    "frozen norm": put(nn.BatchNorm2d, frozen),
    "norm in training mode": do(lambda bn: bn.train(), nn.BatchNorm2d),
    "pruned": do(lambda m: prune.random_unstructured(m, "weight", 0.5), *WEIGHTS),
    "old weight_norm": do(weight_norm, *WEIGHTS),
    "weight_norm": do(parametrizations.weight_norm, *WEIGHTS),
    "old spectral_norm": do(spectral_norm, *WEIGHTS),
    "spectral_norm": do(parametrizations.spectral_norm, *WEIGHTS),
    "weight that is no parameter": do(weight_as_a_tensor, Linear),
    "forward of its own": do(
        with_forward, Linear, nn.BatchNorm2d, nn.GELU, LayerScale, Mlp, ConvMlp, ConvNormAct
    ),
}


def assert_fuses(model: nn.Module) -> None:
    """The same outputs, and no fewer calls of what has been hooked."""
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = model(images)
    torch.testing.assert_close(model.fuse()(images), expected, rtol=1e-9, atol=1e-9)


def in_turn(argument: str, values: Iterable[str], only: dict[str, str]) -> pytest.MarkDecorator:
    """Parametrises with values, each on the models in turn, and on both of them by night.

    Args:
        argument: Of the test, besides `name`.
        values: Of the argument.
        only: The model of those that just one has.
    """
    cases = []
    for place, value in enumerate(values):
        models = [only[value]] if value in only else MODELS
        for number, name in enumerate(models):
            marks = () if number == place % len(models) else pytest.mark.nightly
            cases.append(pytest.param(name, value, marks=marks, id=f"{name}-{value}"))
    return pytest.mark.parametrize(["name", argument], cases)


SCALES = ("subclass of LayerScale", "scales by a linear layer")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@in_turn("change", CHANGES, dict.fromkeys(SCALES, "test_nalaformer"))
@torch.no_grad()
def test_changed_models(name, change):
    model = small(name)
    CHANGES[change](model)
    assert_fuses(model)


@pytest.mark.parametrize(
    "kinds",
    [(nn.Linear, _ConvNd), (nn.BatchNorm2d,), (nn.Linear, _ConvNd, nn.BatchNorm2d)],
    ids=["layers", "norms", "both"],
)
@pytest.mark.parametrize("name", TEST_MODELS)
@torch.no_grad()
def test_biases_that_were_taken_away(name, kinds):
    """One that is missing is zeros, and no fold is left out."""
    model = small(name)
    folded = Counter(type(module) for module in small(name).fuse().modules())
    for module in model.modules():
        if isinstance(module, kinds):
            module.bias = None
    assert_fuses(model)
    assert Counter(type(module) for module in model.fuse().modules()) == folded


@pytest.mark.parametrize("name", TEST_MODELS)
@torch.no_grad()
def test_linear_layers_of_pytorch_in_every_family(name):
    model = small(name)
    put(Linear, torch_linear)(model)
    assert_fuses(model)


HOOKED = ("fc1", "fc2", "act", "dwconv", "drop", "drop1", "drop2", "mlp", "conv", "bn", "conv1")
HOOKED += ("ls1", "ls2", "pos", "pos1", "proj", "proj_drop", "attn", "0")


OF_ONE = dict.fromkeys(("dwconv", "ls1", "ls2", "pos"), "test_nalaformer")
OF_ONE |= dict.fromkeys(("drop1", "drop2", "pos1"), "test_l2vit")


@in_turn("place", HOOKED, OF_ONE)
def test_hooks_are_called_where_they_were(name, place):
    """Hooks that change what goes in and out, and those of the way back."""
    model, calls = small(name), []

    def after(module, args, out):
        calls.append("after")
        return out * 1.25

    def before(module, args):
        calls.append("before")
        return (args[0] * 0.75, *args[1:])

    hooked = [m for key, m in model.named_modules() if key.endswith(f".{place}")]
    for module in hooked:
        module.register_forward_hook(after)
        module.register_forward_pre_hook(before)
        module.register_full_backward_hook(lambda *args: calls.append("back"))
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, requires_grad=True)

    def run():
        calls.clear()
        out = model(images)
        (grad,) = torch.autograd.grad(out.square().sum(), images)
        return list(calls), out, grad

    expected = run()
    assert len(expected[0]) == 3 * len(hooked) > 0
    model.fuse()
    found = run()
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_hooks_of_all_modules():
    model, calls = small("test_nalaformer"), []
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    handle = nn.modules.module.register_module_forward_hook(lambda *args: calls.append(1))
    try:
        model(images)
        number = len(calls)
        model.fuse()(images)
    finally:
        handle.remove()
    assert len(calls) == 2 * number


@torch.no_grad()
def test_all_but_what_was_touched_folds():
    model = small("test_nalaformer")
    block = model.stages[2].blocks[0]
    block.mlp.fc1.register_forward_hook(lambda *args: None)
    model.stem.conv2.bn = nn.GroupNorm(1, model.stem.conv2.bn.num_features).double()
    assert_fuses(model)
    assert isinstance(block.mlp.act, nn.GELU)
    assert isinstance(model.stages[2].blocks[1].mlp.act, nn.Identity)
    assert isinstance(model.stem.conv2, ConvNormAct)
    assert isinstance(model.stem.conv1, nn.Sequential)


@torch.no_grad()
def test_modules_that_blocks_share():
    """Each block scales what they put out with a scale of its own, or lets another use them."""
    model = small("test_nalaformer")
    first, second = model.stages[2].blocks
    second.attn, second.mlp = first.attn, first.mlp
    assert_fuses(model)
    model = small("test_l2vit")
    first, second, *_ = model.stages[2].blocks
    second.mlp = nn.Sequential(first.mlp.fc1, nn.Tanh(), second.mlp.fc2)
    assert_fuses(model)


@torch.no_grad()
def test_wrappers_that_answer_for_what_is_inside():
    model = small("test_nalaformer")
    for stage in model.stages:
        stage.blocks = nn.ModuleList(map(checkpoint_wrapper, stage.blocks))
    model.stem.conv1 = checkpoint_wrapper(model.stem.conv1)
    assert hasattr(model.stem.conv1, "fuse")
    assert_fuses(model)
    assert type(model.stem.conv1).__name__ == "CheckpointWrapper"
    assert not any(isinstance(module, LayerScale) for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("change", ["GroupNorm", "no norm", "frozen norm", "nn.Linear", "pruned"])
def test_reparameterize_model_of_timm_on_changed_models(change):
    model = small("test_nalaformer")
    CHANGES[change](model)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = model(images)
    fused = timm.utils.reparameterize_model(model)
    torch.testing.assert_close(fused(images), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_once_more():
    """Folding folds nothing twice, and what came later is looked at like the rest."""
    model = small("test_nalaformer")
    assert_fuses(model)
    assert_fuses(model)
    put(nn.Identity, lambda identity: nn.GELU())(model)
    assert_fuses(model)


@torch.no_grad()
def test_what_needs_no_gradient_still_needs_none():
    model = small("test_nalaformer").requires_grad_(False)
    model.stages[1].requires_grad_()
    before = {key.rpartition(".")[0]: p.requires_grad for key, p in model.named_parameters()}
    model.fuse()
    for key, parameter in model.named_parameters():
        if (name := key.rpartition(".")[0]) in before:
            assert parameter.requires_grad == before[name], key


def test_plain_modules():
    layer = Linear(4, 4)
    assert is_plain(layer, nn.GELU, Linear)
    assert not is_plain(layer, nn.Linear)
    handle = layer.register_full_backward_pre_hook(lambda *args: None)
    assert not is_plain(layer, Linear)
    handle.remove()
    assert is_plain(layer, Linear)
