"""The contract of the registry: every attention in it, by name.

A mixer is compared with its own definition in float64. Everything else is said of the layer around
it, which is what users hold.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, is_tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitlinear.mixers import (
    Grid,
    Mixer,
    MixerAttention,
    create_attention,
    describe_attention,
    list_attentions,
    make_mixer,
)
from vitlinear.mixers.attention import position_tables

NAMES = list_attentions()
HEADS, DIM = 2, 8  # of a head

each = pytest.mark.parametrize("name", NAMES)


def spread(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter random values: what starts at zero, or alike, would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise.to(parameter.dtype))


def mixer_of(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Mixer:
    torch.manual_seed(0)
    mixer = make_mixer({"name": name, **options}, HEADS * DIM, HEADS, dtype=dtype)
    spread(mixer)
    return mixer.eval()


def layer_of(name: str, dtype: torch.dtype = torch.float64, **kwargs: Any) -> MixerAttention:
    torch.manual_seed(0)
    layer = create_attention(name, HEADS * DIM, HEADS, dtype=dtype, **kwargs)
    spread(layer)
    return layer.eval()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def tokens(grid: Grid, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v [B, N, h, D] and x [B, N, C]."""
    q, k, v = normal(3, batch, grid.length, HEADS, DIM, seed=seed)
    return q, k, v, normal(batch, grid.length, HEADS * DIM, seed=seed + 1)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """The greatest difference, relative to the greatest number."""
    scale = expected.abs().max().clamp(min=1e-3)
    error = float((actual - expected).abs().max().detach() / scale.detach())
    assert error < tolerance, f"relative error {error:.1e}"


@each
@pytest.mark.parametrize("grid", [Grid(4, 6), Grid(3, 5, 2)], ids=["map", "prefix"])
def test_definition(name, grid):
    """Output and gradients, of parameters too, are those of the definition."""
    mixer, (q, k, v, x) = mixer_of(name), tokens(grid)
    inputs = [t.requires_grad_() for t in (q, k, v, x)]
    wanted = [*inputs, *mixer.parameters()]
    out, expected = mixer(q, k, v, grid, x), mixer.definition(q, k, v, grid, x)
    assert out.shape == v.shape and out.dtype == v.dtype
    close(out, expected, 1e-9)
    weights = normal(*out.shape, seed=7)
    found = torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True)
    oracle = torch.autograd.grad((expected * weights).sum(), wanted, allow_unused=True)
    for gradient, exact in zip(found, oracle, strict=True):
        if gradient is not None and exact is not None:
            close(gradient, exact, 1e-7)
        else:
            rest = gradient if exact is None else exact
            assert rest is None or not rest.any()


@each
def test_definition_with_positions(name):
    if describe_attention(name).turns != "inside":
        pytest.skip("positions act before the mixer")
    mixer, (q, k, v, x) = mixer_of(name), tokens(Grid(3, 4))
    grid = Grid(3, 4, rotary=position_tables(mixer, 3, 4, q))
    close(mixer(q, k, v, grid, x), mixer.definition(q, k, v, grid, x), 1e-9)


@each
def test_tokens_before_the_map_and_any_size(name):
    """Tokens before a map, with positions, and a map as tokens and as it is."""
    rope = describe_attention(name).turns != "nowhere"
    layer = layer_of(name, num_prefix_tokens=2, rope=rope)
    for height, width in ((1, 1), (5, 3), (7, 8)):
        x = normal(2, 2 + height * width, HEADS * DIM)
        assert layer(x, height, width).isfinite().all()
    layer.num_prefix_tokens = 0
    x = normal(2, 5, 6, HEADS * DIM)
    close(layer(x), layer(x.flatten(1, 2), 5, 6).reshape(x.shape), 1e-9)


@each
@pytest.mark.parametrize("prefix", [0, 1])
def test_padding_is_cropping(name, prefix):
    """Padding at the right and below is as if it were not there, whatever it holds."""
    layer = layer_of(name, rope=describe_attention(name).turns != "nowhere")
    layer.num_prefix_tokens = prefix
    first, cropped = normal(1, prefix, HEADS * DIM, seed=3), normal(1, 4, 5, HEADS * DIM)
    padded = torch.full((1, 6, 7, HEADS * DIM), torch.nan, dtype=torch.float64)
    padded[:, :4, :5] = cropped
    mask = torch.ones(1, 6, 7, dtype=torch.bool)
    mask[:, :4, :5] = False
    rows = torch.cat((first, padded.flatten(1, 2)), dim=1)
    hidden = torch.cat((mask.new_zeros(1, prefix), mask.flatten(1)), dim=1)
    out = layer(rows, 6, 7, key_padding_mask=hidden)
    expected = layer(torch.cat((first, cropped.flatten(1, 2)), dim=1), 4, 5)
    close(out[:, :prefix], expected[:, :prefix], 1e-9) if prefix else None
    own = out[:, prefix:].reshape(1, 6, 7, -1)[:, :4, :5]
    close(own, expected[:, prefix:].reshape(1, 4, 5, -1), 1e-9)


@each
def test_samples_do_not_meet(name):
    layer, x = layer_of(name), normal(3, 4, 5, HEADS * DIM)
    for one in range(3):
        close(layer(x)[one : one + 1], layer(x[one : one + 1]), 1e-10)
    assert layer(x[:0]).shape == x[:0].shape


def of_every_order() -> list[dict[str, Any]]:
    """All attentions, with default options and with each that changes the order."""
    specs: list[dict[str, Any]] = [{"name": name} for name in NAMES]
    for name in NAMES:
        for change in describe_attention(name).changes:
            if "order" in change.fields:
                specs += [{"name": name, change.option: value} for value in change.values]
    return specs


@pytest.mark.parametrize("spec", of_every_order(), ids=lambda spec: "-".join(spec.values()))
def test_order(spec):
    """Attention without an order is equivariant to permutations of tokens; the others are not."""
    layer, x = layer_of(**spec), normal(2, 81, HEADS * DIM)
    order = torch.randperm(81, generator=torch.Generator().manual_seed(1))
    difference = (layer(x[:, order], 9, 9) - layer(x, 9, 9)[:, order]).abs().max()
    assert layer.mixer.order == describe_attention(**spec).order
    if layer.mixer.order == "free":
        assert difference < 1e-9
    else:
        assert difference > 1e-6


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_adversarial_numbers(name, dtype):
    """Outputs and gradients stay finite, and half types err by their rounding."""
    grid, mixer = Grid(3, 4), mixer_of(name, dtype)
    for scale in (1.0, 1e4, 1e-4, 0.0):
        q, k, v, x = (t.to(dtype) for t in tokens(grid))
        inputs = [(scale * q).requires_grad_(), (scale * k).requires_grad_(), v.requires_grad_()]
        out = mixer(*inputs, grid, x)
        assert out.dtype == dtype and out.isfinite().all(), f"scale {scale}"
        gradients = torch.autograd.grad(out.float().sum(), inputs, allow_unused=True)
        if (name, dtype, scale) == ("softmax", torch.float16, 1e4):
            # PyTorch's own kernel. Backward takes exp of a logit less the same one as forward
            # rounded it: of logits of 4e8 that may be exp(32), more than float16 holds.
            continue
        for gradient in gradients:
            assert gradient is None or gradient.isfinite().all(), f"gradient at scale {scale}"
        if scale == 1.0:
            exact = mixer_of(name)
            exact.load_state_dict(mixer.state_dict())
            wide = [t.detach().double() for t in inputs]
            expected = exact(*wide, grid, x.double())
            allowed = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 1e-4}[dtype]
            close(out.double(), expected, allowed)


@each
def test_gradients_of_a_small_map(name):
    """No part that is 0 there, such as what one window leaves over, has a steep norm behind it."""
    grid, mixer = Grid(3, 4), mixer_of(name)
    q, k, v, x = tokens(grid)
    inputs = [t.requires_grad_() for t in (q, k, v, x)]
    out = mixer(*inputs[:3], grid, x)
    gradients = torch.autograd.grad(out, inputs, normal(*out.shape), allow_unused=True)
    assert all(g is None or g.norm() < 50 * out.numel() ** 0.5 for g in gradients)


class Written(TorchDispatchMode):
    """Counts the numbers that operators write into new memory: of all, and of the greatest."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {
            x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if is_tensor(x)
        }
        for tensor in tree_leaves(out):
            if is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in given:
                numbers = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.numbers += numbers
                self.largest = max(self.largest, numbers)
        return out


@pytest.mark.parametrize(
    "spec",
    [spec for spec in of_every_order() if spec != {"name": "transnormer", "decay": "two_sided"}],
    ids=lambda spec: "-".join(spec.values()),
)
def test_memory_grows_with_the_tokens(spec):
    """A training step writes nothing that grows like N^2, unless the description says so.

    Nor is there a matrix for each token: heads have 64 channels, and no tensor as many maps.
    """
    description = describe_attention(spec["name"])
    if description.quadratic:
        pytest.skip("says that it is quadratic")
    few = {"most_keys": 16} if "most_keys" in description.options else {}  # more in larger maps
    layer = create_attention(**spec, **few, dim=128, num_heads=2)
    numbers = []
    for side in (12, 24):
        with Written() as written:
            layer(torch.randn(1, side, side, 128)).sum().backward()
        numbers.append(written.numbers)
    assert numbers[1] < 4.5 * numbers[0]
    assert written.largest <= 20 * 24 * 24 * 128


@each
def test_too_many_tokens_are_refused(name):
    description = describe_attention(name)
    if not description.quadratic:
        pytest.skip("of linear cost")
    length = description.most_tokens + 1
    q = torch.zeros(1, 1, 1, 1).expand(1, length, HEADS, DIM)
    with pytest.raises(ValueError, match=f"takes at most {description.most_tokens} tokens"):
        mixer_of(name, torch.float32)(q, q, q, Grid(1, length))


class InTurn(nn.Module):
    """Layers that all see the same tokens."""

    def __init__(self, layers: list[MixerAttention]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, H, W, C] -> that, by every layer."""
        return [layer(x) for layer in self.layers]


def in_turn(names: list[str]) -> InTurn:
    return InTurn([layer_of(name, torch.float32) for name in names]).eval()


@pytest.mark.parametrize(
    "names",
    [pytest.param(NAMES[::6], id="some"), pytest.param(NAMES, id="all", marks=pytest.mark.nightly)],
)
def test_many_in_one_program(names):
    """Several of them in one exported program for any batch."""
    model, x = in_turn(names), torch.randn(2, 4, 6, HEADS * DIM)
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    other = torch.randn(3, 4, 6, HEADS * DIM)
    for name, found, expected in zip(names, program(other), model(other), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=name)


@each
@pytest.mark.nightly
@pytest.mark.compile
def test_compile(name):
    """Compiled as one graph, forward and backward; what writes the kernels is left to others."""
    layer, x = layer_of(name, torch.float32).train(), torch.randn(2, 4, 6, HEADS * DIM)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for run in (compiled, layer):
        layer.zero_grad()
        out = run(x)
        out.square().sum().backward()
        gradients = [p.grad for p in layer.parameters() if p.grad is not None]
        if run is compiled:
            found = (out, *gradients)
    for actual, expected in zip(found, (out, *gradients), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)


@each
@pytest.mark.nightly
@pytest.mark.compile
@pytest.mark.process
@pytest.mark.slow
def test_inductor(name):
    """Compiled by Inductor, as users do; without gradients, since each loop is compiled by C++."""
    layer, x = layer_of(name, torch.float32), torch.randn(2, 4, 6, HEADS * DIM)
    with torch.no_grad():
        found = torch.compile(layer, fullgraph=True)(x)
        torch.testing.assert_close(found, layer(x), rtol=2e-3, atol=2e-3)


@each
@pytest.mark.nightly
def test_export(name):
    """Exported alone, for any size of the map."""
    layer, x = layer_of(name, torch.float32), torch.randn(2, 8, 12, HEADS * DIM)
    program = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(program(x), layer(x), rtol=1e-4, atol=1e-4)


@each
@pytest.mark.nightly
def test_onnx(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    layer, x = layer_of(name, torch.float32), torch.randn(2, 4, 6, HEADS * DIM)
    path = tmp_path / "layer.onnx"
    torch.onnx.export(layer, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), layer(x), rtol=1e-3, atol=1e-3)


@each
@pytest.mark.nightly
def test_gradcheck(name):
    grid, mixer = Grid(2, 3), mixer_of(name)
    q, k, v, x = tokens(grid, batch=1)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *t: mixer(*t, grid, x), inputs, rtol=1e-4, atol=1e-5)


def drawn(name: str, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(create_attention(name, HEADS * DIM, HEADS).mixer.named_parameters())


def fixed(name: str) -> dict[str, Tensor]:
    """Initial values of a mixer's parameters that are the same whatever the seed."""
    first, second = drawn(name, 0), drawn(name, 1)
    return {key: value for key, value in first.items() if torch.equal(value, second[key])}


def in_a_model(name: str, **kwargs: Any) -> Any:
    return timm.create_model(
        "test_linear_deit", attention=name, embed_dim=HEADS * DIM, num_heads=HEADS, **kwargs
    )


@each
def test_models_leave_the_initial_values_of_mixers(name):
    """A model gives all linear layers and convolutions the same values, but for these."""
    expected = fixed(name)
    for block in in_a_model(name, depth=2).blocks:
        for key, value in block.attn.mixer.named_parameters():
            if key in expected:
                torch.testing.assert_close(value, expected[key], msg=key)


@each
def test_init_weights_after_to_empty(name):
    model = in_a_model(name, depth=1, device="meta").to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else -1)
    model.init_weights()
    expected = fixed(name)
    for key, value in model.blocks[0].attn.mixer.state_dict().items():
        assert value.isfinite().all(), key
        if key in expected:
            torch.testing.assert_close(value, expected[key], msg=key)


def test_routing_is_recomputed_with_the_centroids_of_its_forward_pass():
    """Which a training step moves: backward would gather other tokens, without a word."""
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        spec = {"name": "routing", "momentum": 0.1, "clusters": 3}
        model = in_a_model(spec, depth=2).train()
        spread(model)
        model.set_grad_checkpointing(checkpointing)
        model(normal(2, 3, 64, 64, dtype=torch.float32)).square().sum().backward()
        grads = {key: value.grad for key, value in model.named_parameters()}
        found.append(grads | dict(model.named_buffers()))
    torch.testing.assert_close(found[0], found[1])
