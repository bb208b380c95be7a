"""Promises of every test-sized model beyond timm's own suite (tests/peer)."""

from __future__ import annotations

import pickle
import warnings
from copy import deepcopy

import pytest
import timm
import torch
from timm.layers import create_feature_extractor
from timm.models import get_model_args, save_for_hf
from timm.optim import param_groups_layer_decay
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel

import vitlinear
from tests.golden import relative_error
from tests.pairwise import label, some_by_night
from vitlinear.export.shapes import shortest_side
from vitlinear.layers import MapRotaryTables
from vitlinear.models import our_models
from vitlinear.models._pyramid import LinearPyramid

TEST_MODELS = [name for name in our_models() if name.startswith("test_")]
PYRAMIDS = [
    name
    for name in TEST_MODELS
    if isinstance(timm.create_model(name, device="meta"), LinearPyramid)
]
# A family with states of its own kind each: what the inner loop takes.
QUICK = ("test_inline_swin", "test_l2vit", "test_linear_deit", "test_nalaformer", "test_ravlt")
# The siblings that are linear throughout run the same code: most runs and compilers see it once.
PROGRAMS = [name for name in TEST_MODELS if not name.endswith("_linear")]
each_model = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.quick
            if name in QUICK
            else ()
            if name in PROGRAMS
            else pytest.mark.nightly,
        )
        for name in TEST_MODELS
    ],
)


def each_model_in_turn(argument: str, first: object, second: object) -> pytest.MarkDecorator:
    """Parametrises with each model and one of two values in turn; the others run by night."""
    return pytest.mark.parametrize(
        ["name", argument],
        [
            pytest.param(
                name,
                value,
                marks=pytest.mark.nightly
                if (i + j) % 2 or name not in PROGRAMS
                else pytest.mark.quick
                if name in QUICK
                else (),
                id=f"{name}-{label(argument, value)}",
            )
            for i, name in enumerate(TEST_MODELS)
            for j, value in enumerate((first, second))
        ],
    )


# Of those, one of each skeleton in every run of the slow tests; the others in nightly runs.
EVERY_RUN = ("test_inline_deit", "test_l2vit", "test_ravlt")
# Windows are compiled and exported by night: of all, they take Dynamo the longest.
COMPILED = ("test_inline_deit", "test_ravlt")
each_program = pytest.mark.parametrize("name", PROGRAMS)
# For the same reason compilers get one block of each kind where the model repeats them.
FEWER_BLOCKS = {
    **dict.fromkeys(
        ("test_inline_deit", "test_lightnet", "test_linear_deit", "test_vittt"), {"depth": 1}
    ),
    **dict.fromkeys(
        (
            *("test_h_vittt", "test_inline_pvt", "test_mavit", "test_mila", "test_nalaformer"),
            "test_pola_pvt",
        ),
        {"depths": (1, 1, 1, 1)},
    ),
    "test_ravlt": {"depths": (1, 0, 1, 0)},  # one stage of either kind of attention
    "test_l2vit": {"depths": (1, 1, 2, 1)},
    "test_pola_swin": {"depths": (2, 1, 1, 1)},
}


# Tracing them for any size takes 20 s each: tests/layers has their attention alone.
ADAPTIVE_WINDOWS = ("test_inline_swin", "test_inline_cswin", "test_pola_swin")


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The residual blocks, in order."""
    return [module for module in model.modules() if hasattr(module, "drop_path1")]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(name: str, **kwargs) -> nn.Module:
    return timm.create_model(name, num_classes=7, **kwargs).eval()


def make_program(name: str, **kwargs) -> nn.Module:
    return make(name, **FEWER_BLOCKS.get(name, {}), **kwargs)


@each_model
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 224), (225, 97), (1, 1)])
def test_any_size(name, size):
    model = make(name)
    x = torch.randn(2, 3, *size)
    assert model(x).shape == (2, 7)
    extractor = timm.create_model(name, features_only=True).eval()
    for feature, info in zip(extractor(x), extractor.feature_info.get_dicts(), strict=True):
        expected = [-(-side // info["reduction"]) for side in size]
        if model.rounds_down:
            expected = [max(side // info["reduction"], 1) for side in size]
        assert list(feature.shape[1:]) == [info["num_chs"], *expected]


@each_model
def test_conversion_to_sync_batch_norm_changes_nothing(name):
    """torch's own conversion drops activations inside of norms; detectors use it."""
    model, x = make(name), torch.randn(1, 3, 64, 64)
    before = model(x)
    assert torch.equal(nn.SyncBatchNorm.convert_sync_batchnorm(model)(x), before)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.nightly if i % 3 else ())
        for i, n in enumerate(TEST_MODELS)
    ],
)
@torch.no_grad()
def test_large_image(name):
    """Sums over many tokens lose little in single precision."""
    model, x = make(name), torch.randn(1, 3, 1024, 512)
    logits = model(x)
    assert relative_error(logits, model.double()(x.double())) < 1e-5


@each_model
def test_batch_equals_single_images(name):
    model, x = make(name), torch.randn(3, 3, 64, 96)
    singles = torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(model(x), singles, rtol=1e-4, atol=1e-5)


@each_model
def test_many_at_once(name):
    """Transforms of functions: images of a batch by `vmap`, rows of a Jacobian together."""
    model = make(name).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        out = torch.func.vmap(lambda image: model(image[None])[0])(x)
        torch.testing.assert_close(out, model(x), rtol=1e-9, atol=1e-9)
    bias = next(p for p in model.parameters() if p.dim() == 1)
    logits, rows = model(x)[0, :3], torch.eye(3, dtype=torch.float64)
    single = torch.stack([torch.autograd.grad(z, bias, retain_graph=True)[0] for z in logits])
    (many,) = torch.autograd.grad(logits, bias, rows, is_grads_batched=True)
    torch.testing.assert_close(many, single, rtol=1e-9, atol=1e-9)


@each_model
def test_channels_last(name):
    model, x = make(name), torch.randn(2, 3, 64, 96)
    expected = model(x)
    x = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-6)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-6)


@each_model
def test_backends_agree(name):
    x = torch.randn(2, 3, 64, 96)
    reference, other = make(name, attn_backend="eager"), make(name, attn_backend="library")
    other.load_state_dict(reference.state_dict())
    for model in (reference, other):
        model(x).square().sum().backward()
    for (key, a), b in zip(
        reference.named_parameters(), (p for p in other.parameters()), strict=True
    ):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=lambda m, k=key: k + m)


@each_model_in_turn("dtype", torch.bfloat16, torch.float16)
def test_half_precision(name, dtype):
    """Arithmetic in half precision adds little to what rounding the weights does already."""
    model, x = make(name), torch.randn(2, 3, 64, 64)
    expected = model(x)
    out = model.to(dtype)(x.to(dtype))
    assert out.dtype == dtype and out.isfinite().all()
    rounded = model.float()(x.to(dtype).float())
    error, rounding = ((y - expected).norm() for y in (out.float(), rounded))
    assert error < 4 * rounding


@each_model_in_turn("backend", "eager", "library")
def test_autocast_training_step(name, backend):
    model = make(name, attn_backend=backend, drop_path_rate=0.1).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.randn(4, 3, 64, 64))
        loss = nn.functional.cross_entropy(out, torch.arange(4))
    loss.backward()
    assert out.dtype == torch.bfloat16
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, key
        assert parameter.grad.isfinite().all(), key


@each_model
def test_training_and_evaluation_are_deterministic(name):
    x = torch.randn(2, 3, 64, 64)

    def step():
        torch.manual_seed(1)
        model = timm.create_model(name, drop_path_rate=0.2, drop_rate=0.1, proj_drop_rate=0.1)
        model.train()(x).square().sum().backward()
        with torch.no_grad():
            return [model.eval()(x), *(p.grad for p in model.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))


@each_model
def test_gradient_checkpointing_changes_no_gradient(name):
    model, x = make(name), torch.randn(2, 3, 64, 64)
    calls: list[int] = []
    blocks = blocks_of(model)
    for block in blocks:
        block.norm1.register_forward_hook(lambda *_: calls.append(1))
    grads, counts = [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        calls.clear()
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        counts.append(len(calls))
    # every block runs again during backward
    assert counts == [len(blocks), 2 * len(blocks)] and counts[0] > 1
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@each_model
def test_gradient_checkpointing_of_chosen_stages(name):
    model = timm.create_model(name)
    parts = getattr(model, "stages", [model])
    last = len(parts) - 1

    def checkpointed():
        return [all(block.grad_checkpointing for block in part.blocks) for part in parts]

    model.set_grad_checkpointing(stages=(last,))
    assert checkpointed() == [False] * last + [True]
    model.set_grad_checkpointing()
    model.set_grad_checkpointing(False, stages=[0])
    assert checkpointed() == [False] + [True] * last
    model.set_grad_checkpointing(stages=[])
    assert checkpointed() == [False] + [True] * last
    with pytest.raises(ValueError, match=f"no stage {last + 1}: the model has stages 0 to {last}"):
        model.set_grad_checkpointing(stages=(0, last + 1))


@each_model
def test_drop_rates_reach_their_modules(name):
    model = timm.create_model(name, drop_path_rate=0.4, drop_rate=0.3, proj_drop_rate=0.2)
    blocks = blocks_of(model)
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for b in blocks]
    assert rates == pytest.approx(torch.linspace(0, 0.4, len(blocks)).tolist())
    assert rates == [getattr(b.drop_path2, "drop_prob", 0.0) for b in blocks]
    dropouts = [m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.p]
    assert dropouts.count(0.3) == 1 and dropouts.count(0.2) >= 2 * len(blocks)
    assert set(dropouts) == {0.2, 0.3}


@each_model
def test_copies(name):
    model, x = make(name), torch.randn(1, 3, 64, 64)
    for copy in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copy(x), model(x))


@pytest.mark.compile
@pytest.mark.slow
@some_by_night("name", [name for name in PROGRAMS if name not in ADAPTIVE_WINDOWS], COMPILED)
def test_compiled_once_for_all_sizes(name):
    counter = CompileCounter()
    compiled = torch.compile(make_program(name), backend=counter, fullgraph=True, dynamic=True)
    for size in ((64, 96), (80, 64), (128, 128), (97, 161)):
        compiled(torch.randn(2, 3, *size))
    assert counter.frame_count == 1


@pytest.mark.compile
@pytest.mark.slow
@some_by_night("name", PROGRAMS, every_run=("test_inline_deit",))
def test_training_compiles_for_sizes_that_change(name):
    """PyTorch's own gradient of resized positions fails in programs for any size."""
    model = make_program(name)
    compiled = torch.compile(model, backend="aot_eager")
    # Both sides change at once: a program for the first size, and one for all others.
    for size in ((64, 64), (96, 128), (128, 96)):
        x = torch.randn(2, 3, *size)
        found, expected = (
            torch.autograd.grad(f(x).square().sum(), model.parameters()) for f in (compiled, model)
        )
        flat = (torch.cat([x.flatten() for x in grads]) for grads in (found, expected))
        assert relative_error(*flat) < 1e-5


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.nightly  # a minute each; tests/layers compiles layers that recompute in every run
@pytest.mark.parametrize("name", ["test_ravlt", "test_l2vit"])
def test_checkpointed_training_compiles_for_any_size(name):
    """Numbers that Dynamo takes for inputs, as constants of a module, fail inside such parts."""
    model = make_program(name).train()
    expected = deepcopy(model)
    model.set_grad_checkpointing()
    # Not a backend that runs Dynamo's graph as it is: with torch 2.14 a batch norm there counts its
    # batches in place while backward still holds the count.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in ((64, 96), (97, 161)):
        x = torch.randn(2, 3, *size)
        grads = [
            torch.autograd.grad(f(x).square().sum(), m.stem.parameters())
            for f, m in ((compiled, model), (expected, expected))
        ]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@each_model
def test_second_derivative(name):
    """Softmax stages need SDPA's plain form for it: the fused one has none on CPUs."""
    model, x = make(name), torch.randn(1, 3, 64, 64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()


def test_rotary_tables_stay_exact_in_half_precision():
    tables = MapRotaryTables(8)(torch.empty(1, 8, 300, 2, dtype=torch.bfloat16))
    expected = MapRotaryTables(8)(torch.empty(1, 8, 300, 2))
    assert tables.rows.dtype == torch.float32 and torch.equal(tables.rows, expected.rows)


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, backend",
    # With the formula models are compiled above too, for all sizes at once.
    [
        pytest.param(n, backend, marks=() if n in COMPILED else pytest.mark.nightly)
        for n, backend in [(n, "library") for n in PROGRAMS]
        + [(n, "eager") for n in ADAPTIVE_WINDOWS]
    ],
)
def test_compile_fullgraph(name, backend):
    model, x = make_program(name, attn_backend=backend), torch.randn(2, 3, 64, 96)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-6)


@each_model_in_turn("backend", "eager", "library")
def test_fx_is_bit_equal(name, backend):
    model, x = make(name, attn_backend=backend), torch.randn(2, 3, 64, 96)
    traced = create_feature_extractor(model, ["head"])
    assert torch.equal(traced(x)["head"], model(x))
    assert torch.equal(traced(x[..., :70])["head"], model(x[..., :70]))


@pytest.mark.slow
@some_by_night("name", PROGRAMS, COMPILED)
def test_export_any_size(name):
    """With registered operators; the formula is exported to ONNX below."""
    model = make_program(name, attn_backend="library")
    side = shortest_side(name)
    batch, height, width = (
        torch.export.Dim(n, min=m, max=2048) for n, m in zip("bhw", (2, side, side), strict=True)
    )
    program = torch.export.export(
        model,
        (torch.randn(2, 3, 70, 90),),
        dynamic_shapes={"x": {0: batch, 2: height, 3: width}},
    )
    for size in ((2, 3, 70, 90), (3, 3, 225, side)):
        x = torch.randn(size)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-6)


@pytest.mark.nightly  # tests/export has programs of all families in every run
@pytest.mark.slow
@each_program
def test_onnx_any_size(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = make_program(name, attn_backend="library")  # which has to give way to the plain formula
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.randn(2, 3, 70, 90),),
            path,
            dynamic_shapes={
                "x": {
                    0: torch.export.Dim("batch"),
                    2: torch.export.Dim("height", min=shortest_side(name), max=2048),
                    3: torch.export.Dim("width", min=shortest_side(name), max=2048),
                }
            },
            dynamo=True,
            # Of onnxscript, takes a third of the time; tests/export exports with it.
            optimize=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(path)
    for size in ((2, 3, 70, 90), (1, 3, 97, 66), (3, 3, 64, 225)):
        x = torch.randn(size)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), model(x), rtol=1e-3, atol=1e-5)


@some_by_night("name", PROGRAMS, EVERY_RUN)  # timm's suite scripts all of them in every run
def test_script(name):
    model, x = make(name), torch.randn(2, 3, 64, 96)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scripted(x[..., :70]), model(x[..., :70]), rtol=1e-4, atol=1e-6)


@each_model
def test_export_to_folder_and_back(name, tmp_path):
    model = timm.create_model(name, in_chans=1, num_classes=5, drop_path_rate=0.1)
    model.reset_classifier(9, "max")
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    x = torch.randn(2, 1, 64, 64)
    assert again.num_classes == 9
    torch.testing.assert_close(again.eval()(x), model.eval()(x))
    assert "drop_path_rate" not in get_model_args(again)


@each_model
def test_init_weights_after_to_empty(name):
    model = timm.create_model(name, device="meta").to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else -1)
    model.init_weights()
    fresh = timm.create_model(name).state_dict()
    for key, value in model.state_dict().items():
        assert value.isfinite().all(), key
        if (value == value.flatten()[0]).all():  # constants are the same, random values not
            assert torch.equal(value, fresh[key]), key
    assert model.eval()(torch.randn(1, 3, 64, 64)).isfinite().all()


@each_model
def test_every_parameter_learns(name):
    model = make(name).train()
    if getattr(model, "num_prefix_tokens", 0):
        # A class token does not see what the last block does to the other tokens alone.
        model.reset_classifier(7, "avg")
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    # What a model holds and never applies has gradients of zero: DDP waits for one of each.
    unapplied = {p for m in model.modules() if hasattr(m, "unapplied") for p in m.parameters()}
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.any() == (parameter not in unapplied)


@each_model
def test_wrong_channel_count_is_named(name):
    for model in (make(name), timm.create_model(name, features_only=True)):
        with pytest.raises(AssertionError, match="in_chans"):
            model(torch.randn(1, 1, 64, 64))
        with pytest.raises(AssertionError, match="batch axis"):
            model(torch.randn(3, 64, 64))


@each_model
def test_no_image_and_no_pixel(name):
    """A batch of none gives logits of none; an image of no pixels is a mistake."""
    model = make(name)
    assert model(torch.randn(0, 3, 64, 64)).shape == (0, 7)
    with pytest.raises(AssertionError, match="must have pixels"):
        model(torch.randn(1, 3, 0, 32))


BAD_OPTIONS = {
    "must have four entries": {"depths": (1, 1)},
    "unknown attention 'quadratic'": {"attn_types": ("quadratic",) * 4},
    "heads of a multiple of 4 channels": {"num_heads": (5, 2, 2, 3)},
    "unknown backend 'cuda'": {"attn_backend": "cuda"},
    "dim 24 does not divide into 0 heads": {"num_heads": (0, 2, 2, 3)},
    "one for each stage; got": {"attn_types": "rala"},
    "in_chans 0": {"in_chans": 0},
    "num_classes must be": {"num_classes": -1},
}


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_bad_option_is_named(message):
    with pytest.raises(ValueError) as caught:
        timm.create_model("test_ravlt", **BAD_OPTIONS[message])
    assert message in str(caught.value)


def test_unknown_pooling_and_option():
    with pytest.raises(AssertionError, match="'median' is not supported; choose from"):
        timm.create_model("test_ravlt", global_pool="median")
    with pytest.raises(TypeError, match="window_size"):
        timm.create_model("test_ravlt", window_size=7)


@pytest.mark.parametrize("name", PYRAMIDS)
def test_map_of_logits(name):
    """Without pooling the classifier runs at every place; its mean is the pooled answer."""
    model, x = make(name), torch.randn(2, 3, 64, 96)
    expected, weight = model(x), model.get_classifier().weight
    model.reset_classifier(7, "")
    model.get_classifier().load_state_dict({"weight": weight, "bias": torch.zeros(7)})
    assert model(x).shape == (2, 7, 2, 3)
    torch.testing.assert_close(model(x).mean((2, 3)), expected, rtol=1e-4, atol=1e-6)


@each_model
def test_layer_decay_covers_every_parameter(name):
    model = timm.create_model(name)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.7)
    grouped = sum(len(group["params"]) for group in groups)
    assert grouped == len(list(model.parameters()))
    # stem, every block, and what comes after them
    assert len({group["lr_scale"] for group in groups}) == len(blocks_of(model)) + 2


def test_backend_report():
    model = timm.create_model("test_ravlt", attn_backend="library")
    report = vitlinear.backend_report(model, (2, 3, 96, 64))
    assert [row.attn_type for row in report] == ["rala", "rala", "softmax", "softmax", "softmax"]
    assert report[0].shape == (2, 24 * 16, 1, 24)
    assert [row.backend for row in report] == ["library"] * 2 + ["eager"] * 3
    table = str(report).splitlines()
    assert len(table) == 6 and "2 x 384 x 1 x 24" in table[1] and "by argument" in table[1]
    model = timm.create_model("test_ravlt", in_chans=1).train()
    model.stem.eval()
    assert vitlinear.backend_report(model)[0].shape == (1, 40 * 40, 1, 24)
    assert model.training and not model.stem.training and model.head.training
    with pytest.raises(ValueError, match="no attention of vitlinear"):
        vitlinear.backend_report(nn.Linear(2, 2))


def test_backend_report_of_compiled_models():
    """It is that of the model as it was before; none is compiled for it."""
    expected = vitlinear.backend_report(timm.create_model("test_ravlt"))
    whole, part, in_place = (timm.create_model("test_ravlt") for _ in range(3))
    part.stages[0] = torch.compile(part.stages[0])
    in_place.compile()
    for model in (torch.compile(whole), part, in_place):
        assert vitlinear.backend_report(model) == expected
