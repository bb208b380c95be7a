"""Valid sizes: an image in a padded batch gives what it gives alone, for every family."""

from __future__ import annotations

import copy
import io
import re
import threading
from collections.abc import Sequence

import pytest
import timm
import torch
from skimage import data
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import vitlinear
from tests.golden import relative_error
from tests.pairwise import pairwise, siblings_by_night, some_by_night
from vitlinear.dense.padding import (
    add_hooks,
    attach_valid_sizes,
    padding,
    remove_hooks,
    valid_sizes_of,
)
from vitlinear.errors import UserError
from vitlinear.models._valid_region import ValidRegion, use_valid_region, valid_region

TEST_MODELS = [
    name
    for name in timm.list_models("test_*")
    if timm.model_entrypoint(name).__module__.startswith(f"{vitlinear.__name__}.")
]
each_model = siblings_by_night(TEST_MODELS)
# A map for rows of masks, one whose windows follow its size, one with learned positions.
SOME = ["test_ravlt_linear", "test_inline_swin", "test_inline_deit"]
some_models = pytest.mark.parametrize("name", SOME)
FULL = (96, 128)  # larger than the windows of the test models and than the grids of positions
MULTIPLES, ODD = (64, 96), (75, 61)
# Sums over other numbers of zeros are taken in another order.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(name: str, dtype: torch.dtype = torch.float64, **kwargs) -> nn.Module:
    """A model none of whose parts is without effect, as norms and biases are at first."""
    model = timm.create_model(name, num_classes=0, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype)


def batch_of(images: Sequence[Tensor], fill: float = torch.nan) -> Tensor:
    """Images in one tensor, with something to the right and below."""
    height, width = (max(sides) for sides in zip(*(x.shape[-2:] for x in images), strict=True))
    batch = images[0].new_full((len(images), 3, height, width), fill)
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return batch


def sizes_of(images: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(x.shape[1], x.shape[2]) for x in images]


def maps_of(model: nn.Module, images: Tensor) -> list[Tensor]:
    return model.forward_intermediates(images, intermediates_only=True)


def padded_maps(model: nn.Module, images: Sequence[Tensor], fill: float = torch.nan):
    """Maps of a padded batch."""
    batch = batch_of(images, fill)
    with padding(model, batch.shape[-2:], sizes_of(images)):
        return maps_of(model, batch)


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative, of one map inside a larger one."""
    actual = actual[:, : expected.shape[1], : expected.shape[2]]
    return float((actual - expected).norm() / expected.norm())


@pairwise(name=TEST_MODELS, size=[MULTIPLES, ODD], dtype=[torch.float64, torch.float32])
@torch.no_grad()
def test_padded_image_gives_what_it_gives_alone(name, size, dtype):
    """NaN in the padding, too; without valid sizes even zeros there change all maps."""
    model = make(name, dtype)
    images = [torch.randn(3, *size, dtype=dtype), torch.randn(3, *FULL, dtype=dtype)]
    together = padded_maps(model, images)
    unaware = maps_of(model, batch_of(images, 0.0))
    assert len(together) >= 4
    for i, image in enumerate(images):
        for alone, actual, wrong in zip(
            maps_of(model, image[None]), together, unaware, strict=True
        ):
            assert actual[i].isfinite().all()
            assert error(actual[i], alone[0]) < TOLERANCE[dtype]
            if image.shape[1:] != FULL:
                assert error(wrong[i], alone[0]) > 1e-2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in TEST_MODELS if not name.endswith("_linear")),
        ("test_lightnet", {"bidirectional": True}),  # whose filters look to the right and below
        ("test_linear_deit", {"patch_size": 14}),
    ],
)
@torch.no_grad()
def test_any_size(name, options):
    """Also of the batch: 70 and 100 are no multiples of the last stride."""
    model = make(name, **options)
    sizes = [(100, 70), (1, 1), (5, 9), (33, 70), (100, 17), (63, 64)]
    images = [torch.randn(3, *size).double() for size in sizes]
    together = padded_maps(model, images)
    for i, image in enumerate(images):
        for alone, actual in zip(maps_of(model, image[None]), together, strict=True):
            assert error(actual[i], alone[0]) < TOLERANCE[torch.float64]


@some_by_night("name", TEST_MODELS, SOME)
@torch.no_grad()
def test_photographs(name):
    """Of a size whose larger maps every family splits into windows, if it has any."""
    photographs = [data.coffee()[:150, :201], data.chelsea()[:97, :160]]
    images = [(torch.tensor(x).permute(2, 0, 1).float() / 255 - 0.45) / 0.225 for x in photographs]
    model = make(name, torch.float32)
    canvas = torch.zeros(3, 160, 224)  # multiples of 32, as detectors make them
    together = padded_maps(model, [*images, canvas], 0.0)
    for i, image in enumerate(images):
        for alone, actual in zip(maps_of(model, image[None]), together, strict=True):
            assert error(actual[i], alone[0]) < TOLERANCE[torch.float32]


def backward(model: nn.Module, maps: Sequence[Tensor], images: Sequence[Tensor]) -> None:
    """Gradients of a loss over the valid part of each map, added to those that are there."""
    loss = torch.zeros((), dtype=torch.float64)
    for i, image in enumerate(images):
        with torch.no_grad():
            alone = maps_of(model, image[None])
        for x, expected in zip(maps, alone, strict=True):
            valid = x[i, :, : expected.shape[2], : expected.shape[3]]
            loss = loss + (valid * torch.linspace(-1, 1, valid.shape[2], dtype=x.dtype)).sum()
    loss.backward()


def take_gradients(model: nn.Module) -> dict[str, Tensor]:
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and expected
    # Some vanish but for rounding, such as those of key biases under a softmax.
    scale = max(float(grad.norm()) for grad in expected.values())
    for key, grad in expected.items():
        difference = float((actual[key] - grad).norm())
        assert difference < 1e-12 * float(grad.norm()) + 1e-14 * scale, key


@each_model
def test_gradients_equal_those_of_single_images(name):
    model = make(name)
    images = [torch.randn(3, *size).double() for size in (FULL, ODD)]
    for image in images:
        backward(model, maps_of(model, image[None]), [image])
    expected = take_gradients(model)
    backward(model, padded_maps(model, images), images)
    assert_same_gradients(take_gradients(model), expected)


@some_models
def test_checkpointing_recomputes_under_the_sizes_of_its_forward_pass(name):
    """Two forward passes, then backward through both, from a thread that knows of no sizes."""
    model = make(name)
    batches = [
        [torch.randn(3, *size).double() for size in sizes]
        for sizes in ((MULTIPLES, FULL), (ODD, FULL), (FULL,))
    ]
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        outputs = [padded_maps(model, images) for images in batches]

        def run(outputs=outputs):
            for maps, images in zip(outputs, batches, strict=True):
                backward(model, maps, images)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        gradients.append(take_gradients(model))
    assert_same_gradients(*reversed(gradients))


@each_model
def test_bfloat16_is_finite(name):
    model = make(name, torch.bfloat16)
    images = [torch.randn(3, *size).bfloat16() for size in (MULTIPLES, ODD, FULL)]
    maps = padded_maps(model, images)
    sum(x.float().square().mean() for x in maps).backward()
    assert all(x.isfinite().all() for x in maps)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@some_models
def test_autocast_training_step(name):
    model = make(name, torch.float32).train()
    images = [torch.randn(3, *size) for size in (MULTIPLES, ODD, FULL)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = padded_maps(model, images)
    sum(x.float().square().mean() for x in maps).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_masks_reach_the_registered_operators():
    images = [torch.randn(3, *size).double() for size in (ODD, FULL)]
    formula = make("test_mavit_linear", attn_backend="eager")
    operator = make("test_mavit_linear", attn_backend="library")
    operator.load_state_dict(formula.state_dict())
    for x, y in zip(padded_maps(formula, images), padded_maps(operator, images), strict=True):
        assert error(y, x) < 1e-13


@pytest.mark.quick
@torch.no_grad()
def test_nothing_changes_without_padding():
    model, x = make("test_ravlt"), torch.randn(2, 3, 64, 64).double()
    expected = model(x)
    for sizes in (None, [(64, 64), (64, 64)]):
        with padding(model, (64, 64), sizes):
            assert torch.equal(model(x), expected)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with padding(model, (64, 64), [(64, 64), (32, 64)]):
        padded = model(x)
    assert not torch.equal(padded, expected)
    assert torch.equal(model(x), expected)


@torch.no_grad()
def test_inner_context_counts_and_an_error_ends_it():
    model, x = make("test_ravlt"), torch.randn(2, 3, 64, 64).double()
    expected = maps_of(model, x)
    with padding(model, (64, 64), [(32, 32), (64, 64)]):
        outer = maps_of(model, x)
        with padding(model, (64, 64), None):
            assert all(map(torch.equal, maps_of(model, x), expected))
        assert all(map(torch.equal, maps_of(model, x), outer))
    with (
        pytest.raises(ZeroDivisionError),
        padding(model, (64, 64), [(32, 32), (64, 64)]),
    ):
        raise ZeroDivisionError
    assert valid_region() is None


@torch.no_grad()
def test_threads_have_sizes_of_their_own():
    model, x = make("test_ravlt"), torch.randn(1, 3, 64, 64).double()
    add_hooks(model)
    expected, seen = model(x), []
    with padding(model, (64, 64), [(32, 32)]):
        thread = threading.Thread(target=lambda: seen.append(model(x)))
        thread.start()
        thread.join()
        assert not torch.equal(model(x), expected)
    torch.testing.assert_close(seen[0], expected)


@torch.no_grad()
def test_copies_and_files_of_models_with_hooks():
    model = make("test_inline_swin")
    images = [torch.randn(3, *size).double() for size in (ODD, FULL)]
    expected = padded_maps(model, images)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        hooks = [len(module._forward_pre_hooks) for module in other.modules()]
        assert all(map(torch.equal, padded_maps(other, images), expected))
        assert max(hooks) == 1  # which the second use of the copy has left
        assert hooks == [len(module._forward_pre_hooks) for module in other.modules()]


@torch.no_grad()
def test_model_fused_between_two_uses():
    model = make("test_nalaformer")
    images = [torch.randn(3, *size).double() for size in (ODD, FULL)]
    expected = padded_maps(model, images)
    model.fuse()
    for actual, before in zip(padded_maps(model, images), expected, strict=True):
        for i, (height, width) in enumerate(sizes_of(images)):
            scale = FULL[0] // actual.shape[2]
            valid = before[i][:, : -(-height // scale), : -(-width // scale)]
            assert error(actual[i], valid) < 1e-12


def test_hooks_come_off_for_scripting():
    model, x = make("test_ravlt"), torch.randn(1, 3, 64, 64).double()
    add_hooks(model)
    remove_hooks(model)
    assert not any(
        module._forward_pre_hooks or module._forward_pre_hooks_with_kwargs
        for module in model.modules()
    )
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@pytest.mark.nightly  # as a part of a backbone it is compiled in every run
@pytest.mark.compile
@torch.no_grad()
def test_compiled():
    model = make("test_ravlt", depths=(1, 1, 1, 1))
    images = [torch.randn(3, *size).double() for size in (ODD, FULL)]
    batch, sizes = batch_of(images, 0.0), sizes_of(images)
    expected, plain = padded_maps(model, images), maps_of(model, batch)  # leaves hooks

    def run(images, sizes):
        with padding(model, images.shape[-2:], sizes):
            return maps_of(model, images)

    counter = CompileCounter()
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    # Not equal bit for bit: elu + 1 is another formula there.
    assert max(map(error, compiled(batch, None), plain)) < 1e-12
    assert counter.frame_count == 1
    assert max(map(error, compiled(batch, sizes), expected)) < 1e-12


@pytest.mark.compile
@torch.no_grad()
def test_program_compiled_outside_is_never_run_without_its_sizes():
    """It is refused, or compiled again: which of the two depends on Dynamo and on what it has."""
    model, x = make("test_linear_deit", depth=1), torch.randn(2, 3, 32, 64).double()
    sizes = [(32, 64), (20, 31)]
    add_hooks(model)
    with padding(model, x.shape[-2:], sizes):
        expected = model(x)
    compiled = torch.compile(model, backend="eager")
    assert relative_error(compiled(x), expected) > 0.01
    try:
        with padding(model, x.shape[-2:], sizes):
            out = compiled(x)
    except (AssertionError, RuntimeError) as error:  # Dynamo's on the guard, or else ours
        assert re.search("ValidRegion|did not see the valid", str(error))
    else:
        assert relative_error(out, expected) < 1e-12


def test_forward_pass_that_asks_for_no_sizes():
    model = make("test_ravlt")
    with (
        pytest.raises(RuntimeError, match="did not see the valid sizes"),
        padding(model, (64, 64), [(32, 64)]),
    ):
        pass


def test_sizes_travel_on_the_batch():
    images = torch.zeros(2, 3, 32, 64)
    assert valid_sizes_of(images) is None
    assert attach_valid_sizes(images, torch.tensor([[32, 64], [20, 30]])) is images
    assert valid_sizes_of(images) == ((32, 64), (20, 30))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([(32, 64)], "1 valid sizes for a batch of 2"),
        ([(32, 64), (33, 64)], "33 x 64 does not fit padded images of 32 x 64"),
        ([(32, 64), (0, 64)], "0 x 64 does not fit"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(UserError, match=message):
        attach_valid_sizes(torch.zeros(2, 3, 32, 64), sizes)


def test_errors_of_the_context():
    model = make("test_ravlt", torch.float32)
    with (
        pytest.raises(UserError, match="2 valid sizes for a batch of 3"),
        padding(model, (64, 64), [(32, 32), (64, 64)]),
    ):
        model(torch.zeros(3, 3, 64, 64))
    with (
        pytest.raises(UserError, match="65 x 64 does not fit"),
        padding(model, (64, 64), [(65, 64)]),
    ):
        pass
    other = timm.create_model("resnet18", num_classes=0)
    with (
        pytest.raises(UserError, match="ResNet has no attention of vitlinear"),
        padding(other, (64, 64), [(32, 64)]),
    ):
        pass


@pytest.mark.parametrize("image", [(512, 768), (500, 333), (33, 47)])
@pytest.mark.parametrize("stride", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("rounds_down", [False, True])
def test_sizes_on_maps(image, stride, rounds_down):
    def places(sides):
        return tuple(max(n // stride, 1) if rounds_down else -(-n // stride) for n in sides)

    sizes = [image, (image[0] - 1, image[1] // 2), (1, image[1] - 5)]
    region = ValidRegion(image, sizes, rounds_down)
    assert region.map_sizes(*places(image)) == [places(size) for size in sizes]
    mask = region.mask(*places(image), torch.device("cpu"))
    for of_image, (height, width) in zip(mask, map(places, sizes), strict=True):
        assert not of_image[:height, :width].any()
        assert of_image.sum() == of_image.numel() - height * width


def test_sizes_on_maps_that_a_neck_makes_of_the_last():
    region = ValidRegion((800, 800), [(700, 319)], rounds_down=True)
    assert region.map_sizes(25, 25) == [(21, 9)]
    assert region.map_sizes(13, 13) == [(11, 5)]
    assert region.map_sizes(7, 7) == [(6, 3)]


def test_sizes_on_maps_of_patches_of_14_pixels():
    region = ValidRegion((224, 70), [(150, 60)], patch_size=14)
    assert region.map_sizes(16, 5) == [(11, 5)]
    assert region.map_sizes(64, 20) == [(44, 20)]
    assert region.map_sizes(8, 3) == [(6, 3)]
    # What a model itself pads to whole patches is not image either.
    assert region.map_sizes(238, 70) == [(150, 60)]
    with pytest.raises(ValueError, match="no map of images of 224 pixels has a side of 15"):
        region.map_sizes(15, 5)


def test_region_is_that_of_the_innermost_context():
    first, second = (ValidRegion((64, 64), [(n, n)]) for n in (32, 16))
    with use_valid_region(first):
        with use_valid_region(second):
            assert valid_region() is second
        assert valid_region() is first
    assert valid_region() is None
