"""MultiScaleBackbone: every family's maps, and what is trained of it."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import vitlinear  # noqa: F401  registers the models
from tests.golden import upstream_state_dict, variants
from tests.pairwise import pairwise
from vitlinear.checkpoints.card import Card, save_weights
from vitlinear.checkpoints.read import CheckpointError
from vitlinear.create import data_config
from vitlinear.dense.backbone import MultiScaleBackbone
from vitlinear.dense.padding import attach_valid_sizes
from vitlinear.errors import UserError

MODELS = [
    name
    for name in timm.list_models("test_*", exclude_filters="*_linear")
    if timm.model_entrypoint(name).__module__.startswith("vitlinear.")
]
ISOTROPIC = ["test_inline_deit", "test_lightnet", "test_linear_deit", "test_vittt"]
each_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.randn(2, 3, height, width)


def loss_of(maps) -> torch.Tensor:
    return sum((x * torch.linspace(-1, 1, x.shape[-1])).square().mean() for x in maps)


@pytest.mark.quick
@each_model
def test_maps(name):
    """Channels and strides are as announced; layouts are what a convolution takes as they are."""
    backbone = MultiScaleBackbone(name).eval()
    maps = backbone(images())
    assert isinstance(maps, tuple) and backbone.reductions == (4, 8, 16, 32)
    for x, channels, reduction in zip(maps, backbone.channels, backbone.reductions, strict=True):
        assert x.shape == (2, channels, 64 // reduction, 96 // reduction)
        assert x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    x = images()
    model = timm.create_model(name, num_classes=0).eval()
    missing, unexpected = model.load_state_dict(backbone.model.state_dict(), strict=False)
    assert not unexpected and all(key.startswith(("final.", "norm.")) for key in missing)
    count = 1 if name in ISOTROPIC else 4
    expected = model.forward_intermediates(x, indices=count, intermediates_only=True)
    if name in ISOTROPIC:
        expected = backbone.pyramid(expected[0])
    torch.testing.assert_close(backbone(x), tuple(expected))


@each_model
def test_an_output_stride_is_refused_in_words(name):
    """DeepLab of segmentation_models_pytorch asks for 16; its other decoders give 32."""
    model = timm.create_model(name, features_only=True, output_stride=32)
    assert (
        model.feature_info.reduction()
        == timm.create_model(name, features_only=True).feature_info.reduction()
    )
    for stride in (8, 16):
        with pytest.raises(ValueError, match=f"{name} has no output_stride: .* leave"):
            timm.create_model(name, features_only=True, output_stride=stride)
        with pytest.raises(UserError, match="has no output_stride"):
            MultiScaleBackbone(name, output_stride=stride)


@each_model
def test_maps_of_some_levels(name):
    """Every parameter has a gradient, and the maps do not depend on which others are given."""
    whole = MultiScaleBackbone(name, out_norms=True).eval()
    some = MultiScaleBackbone(name, out_indices=(1, 2), out_norms=True)
    weights = whole.state_dict()
    some.load_state_dict({key: weights[key] for key in some.state_dict()})
    assert some.channels == whole.channels[1:3] and some.reductions == (8, 16)
    x = images()
    torch.testing.assert_close(some.eval()(x), whole(x)[1:3])
    loss_of(some.train()(x)).backward()
    assert all(parameter.grad is not None for parameter in some.parameters())


@each_model
@pytest.mark.parametrize("height, width", [(97, 130), (33, 64)])
def test_odd_sizes(name, height, width):
    backbone = MultiScaleBackbone(name).eval()
    sides = [(x.shape[2], x.shape[3]) for x in backbone(images(height, width))]
    if backbone.model.rounds_down:  # leaves incomplete patches out, as released
        expected = [(height // 4 >> i, width // 4 >> i) for i in range(4)]
    elif name in ISOTROPIC:
        rows, columns = -(-height // 16), -(-width // 16)
        if name == "test_vittt":  # likewise
            rows, columns = height // 16, width // 16
        expected = [(4 * rows, 4 * columns), (2 * rows, 2 * columns), (rows, columns)]
        expected.append((-(-rows // 2), -(-columns // 2)))
    else:
        expected = [(-(-height // (4 << i)), -(-width // (4 << i))) for i in range(4)]
    assert sides == expected


def test_parameters_have_the_names_of_the_classifier():
    backbone = MultiScaleBackbone("test_ravlt", out_norms=True, out_indices=(0, 2))
    classifier = timm.create_model("test_ravlt").state_dict()
    names = {key.removeprefix("model.") for key in backbone.state_dict() if key[:6] == "model."}
    assert names < classifier.keys()
    assert not any(key.startswith(("head.", "final.", "stages.3")) for key in names)
    assert {key for key in backbone.state_dict() if key.startswith("norms.")} == {
        f"norms.{i}.{value}" for i in (0, 2) for value in ("weight", "bias")
    }


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_norms_of_the_maps(eps):
    plain = MultiScaleBackbone("test_mavit").eval()
    normed = MultiScaleBackbone("test_mavit", out_norms=True, out_norm_eps=eps).eval()
    normed.model.load_state_dict(plain.model.state_dict())
    for norm in normed.norms.values():
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = images()
    for bare, y, norm in zip(plain(x), normed(x), normed.norms.values(), strict=True):
        bare = bare.permute(0, 2, 3, 1)
        centred = bare - bare.mean(-1, keepdim=True)
        expected = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        expected = expected * norm.weight + norm.bias
        torch.testing.assert_close(y, expected.permute(0, 3, 1, 2))


@pytest.mark.parametrize("name", ["test_ravlt", "test_lightnet"])
def test_device_and_type(name):
    backbone = MultiScaleBackbone(name, out_norms=True, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in backbone.parameters())


@pytest.mark.parametrize("name", ["test_ravlt", "test_linear_deit"])
def test_mixed_precision(name):
    backbone = MultiScaleBackbone(name, out_norms=True)
    with torch.autocast("cpu", torch.bfloat16):
        maps = backbone(images())
    loss_of(x.float() for x in maps).backward()
    assert all(parameter.grad.isfinite().all() for parameter in backbone.parameters())


def stage_of(key: str) -> int:
    """0 for what comes before the stages, n for the n-th stage, or block."""
    _, part, number, *_ = key.split(".") + [""]
    return int(number) + 1 if part in ("stages", "blocks") else 0


@each_model
@pytest.mark.parametrize("frozen", [-1, 0, 2])
def test_frozen_stages(name, frozen):
    backbone = MultiScaleBackbone(name, frozen_stages=frozen, out_norms=True, drop_path_rate=0.5)
    for mode in (backbone.train(), backbone.eval().train()):
        assert mode.training
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    loss_of(backbone(images())).backward()
    for key, parameter in backbone.named_parameters():
        is_frozen = key.startswith("model.") and stage_of(key) <= frozen
        assert parameter.requires_grad != is_frozen, key
        assert (parameter.grad is None) == is_frozen, key
    for key, buffer in backbone.named_buffers():
        if key.endswith("running_mean"):
            assert buffer.equal(before[key]) == (stage_of(key) <= frozen), key
    for key, module in backbone.model.named_modules():
        if isinstance(module, nn.Dropout) or "drop_path" in key:
            assert module.training == (stage_of(f"model.{key}") > frozen), key


def test_everything_may_be_frozen():
    backbone = MultiScaleBackbone("test_l2vit", frozen_stages=4)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    stages = backbone.model.stages
    assert not any(module.training for stage in stages for module in stage.modules())


@pytest.mark.parametrize("convert", [False, True])
def test_norm_eval(convert):
    backbone = MultiScaleBackbone("test_ravlt", norm_eval=True)
    if convert:
        backbone = nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
    backbone.eval().train()
    norms = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > 4 and not any(norm.training for norm in norms)
    assert all(block.training for stage in backbone.model.stages for block in stage.blocks)
    mean = norms[0].running_mean.clone()
    if not convert:  # synchronised ones want a GPU
        loss_of(backbone(images())).backward()
        assert norms[0].running_mean.equal(mean) and norms[0].weight.grad is not None


@each_model
def test_grad_checkpointing(name):
    """The same gradients from fewer kept activations."""
    x, kept, gradients = images(), [], []

    def keep(tensor):
        kept[-1] += tensor.numel()
        return tensor

    for checkpointing in (False, True):
        torch.manual_seed(0)
        backbone = MultiScaleBackbone(name, grad_checkpointing=checkpointing)
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = loss_of(backbone(x))
        loss.backward()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
    assert kept[1] < 0.7 * kept[0]
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("name", ["test_ravlt", "test_inline_pvt", "test_lightnet"])
def test_distributed_training_finds_all_gradients(name, process_group):
    """DDP fails at the second step if a parameter took no part in the first."""
    model = DistributedDataParallel(MultiScaleBackbone(name, (1, 2, 3), True, frozen_stages=1))
    for _ in range(2):
        loss_of(model(images())).backward()


def random(backbone: MultiScaleBackbone) -> MultiScaleBackbone:
    """In float64, with no norm or bias that is without effect."""
    with torch.no_grad():
        for parameter in backbone.double().parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return backbone.eval()


@pairwise(every=2, name=MODELS, size=[(64, 96), (50, 83)])
def test_padded_batch(name, size):
    """The maps of an image do not depend on the batch that it stands in."""
    backbone = random(MultiScaleBackbone(name, out_norms=True))
    batch = torch.randn(2, 3, 128, 160).double()
    alone = torch.zeros(1, 3, 64, 96).double()  # a multiple of the largest stride
    alone[0, :, : size[0], : size[1]] = batch[0, :, : size[0], : size[1]]
    expected = backbone(alone, [size])
    explicit = backbone(batch, [size, (128, 160)])
    noted = backbone(attach_valid_sizes(batch.clone(), [size, (128, 160)]))
    for x, y, z, stride in zip(expected, explicit, noted, backbone.reductions, strict=True):
        rows, columns = (
            max(side // stride if backbone.model.rounds_down else -(-side // stride), 1)
            for side in size
        )
        torch.testing.assert_close(y[:1, :, :rows, :columns], x[:, :, :rows, :columns])
        assert y.equal(z) and y.isfinite().all()
    x, y = (maps[0][0, :, : size[0] // 4, : size[1] // 4] for maps in (expected, backbone(batch)))
    assert (x - y).norm() > 1e-3 * x.norm()  # there is something to keep out


@each_model
def test_gradients_of_whole_maps_are_those_of_the_images_alone(name):
    """Losses see padding too: what it holds must not train the model."""
    images, sizes = torch.randn(2, 3, 64, 96).double(), [(64, 64), (32, 96)]
    backbone = random(MultiScaleBackbone(name, out_norms=True))

    def gradients(*batches: torch.Tensor) -> list[torch.Tensor]:
        backbone.zero_grad()
        for batch in batches:
            sum((x - 1).pow(3).sum() for x in backbone(batch)).backward()
        return [p.grad for p in backbone.parameters()]

    alone = [
        image[None, :, :height, :width]
        for image, (height, width) in zip(images, sizes, strict=True)
    ]
    for image, one in zip(images, alone, strict=True):
        padded = torch.zeros_like(image)
        padded[:, : one.shape[2], : one.shape[3]] = one[0]
        image.copy_(padded)
    expected = gradients(*alone)
    got = gradients(attach_valid_sizes(images, sizes))
    # Some are zero but for rounding.
    scale = max(gradient.abs().max().item() for gradient in expected)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12 * scale)


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("test_ravlt", {"depths": (1, 0, 1, 0)}),
        pytest.param("test_lightnet", {}, marks=pytest.mark.nightly),
    ],
    ids=["test_ravlt", "test_lightnet"],
)
def test_padded_batch_compiled(name, kwargs):
    backbone = random(MultiScaleBackbone(name, **kwargs))
    batch, sizes = torch.randn(2, 3, 64, 96).double(), [(40, 64), (64, 96)]
    compiled = torch.compile(backbone, backend="eager", fullgraph=True)
    for valid_sizes in (None, sizes):
        expected = backbone(batch, valid_sizes)
        torch.testing.assert_close(compiled(batch, valid_sizes), expected)


def test_gradients_of_a_padded_batch_recomputed():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        backbone = random(MultiScaleBackbone("test_lightnet", grad_checkpointing=checkpointing))
        batch = attach_valid_sizes(images(64, 96).double(), [(40, 64), (64, 96)])
        loss_of(backbone.train()(batch)).backward()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_other_models_do_not_look_at_valid_sizes():
    backbone = MultiScaleBackbone("resnet10t").eval()
    batch = images()
    expected = backbone(batch)
    noted = backbone(attach_valid_sizes(batch, [(40, 64), (64, 96)]))
    assert all(x.equal(y) for x, y in zip(expected, noted, strict=True))
    with pytest.raises(UserError, match="no attention of vitlinear"):
        backbone(batch, [(40, 64), (64, 96)])


@pytest.mark.parametrize("name", ["convnext_atto", "resnet10t", "test_vit"])
def test_other_models_of_timm(name):
    backbone = MultiScaleBackbone(name, out_indices=(2, 3), out_norms=True)
    x = torch.randn(2, 3, 160, 160)
    maps = backbone(x)
    loss_of(maps).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())
    assert [tuple(y.shape[1:]) for y in maps] == [
        (channels, 160 // reduction, 160 // reduction)
        for channels, reduction in zip(backbone.channels, backbone.reductions, strict=True)
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"model": "test_ravllt"}, "unknown model 'test_ravllt'.*test_ravlt"),
        ({"out_indices": (0, 4)}, r"ascending, out of 0 to 3; got \(0, 4\), where 4 is none"),
        ({"out_indices": (0, -2, 3)}, r"got \(0, -2, 3\), where -2 is none"),
        ({"out_indices": (0, 1.0)}, r"got \(0, 1.0\), where 1.0 is none"),
        ({"out_indices": (0, True)}, r"got \(0, True\), where True is none"),
        ({"out_indices": True}, "got True, where True is none"),
        ({"out_indices": 2.0}, "got 2.0, where 2.0 is none"),
        ({"out_indices": None}, "got None, where None is none"),
        ({"out_indices": "12"}, "got '12', where '12' is none"),
        ({"model": "test_lightnet", "out_indices": (1.0,)}, "where 1.0 is none"),
        ({"out_indices": (1, 0)}, "ascending"),
        ({"out_indices": (-1,)}, "ascending"),
        ({"out_indices": ()}, "ascending"),
        ({"model": "test_lightnet", "out_indices": (4,)}, "out of 0 to 3"),
        ({"frozen_stages": 5}, "from -1 to 4, got 5"),
        ({"frozen_stages": -2}, "from -1 to 4, got -2"),
        ({"out_indices": (0, 1), "frozen_stages": 3}, "from -1 to 2, got 3"),
        ({"model": "test_lightnet", "frozen_stages": 5}, "from -1 to 4, got 5"),
        ({"model": "resnet10t", "frozen_stages": 0}, "from -1 to -1, got 0"),
        ({"bananas": 3}, "bananas"),
        ({"pretrained": True, "checkpoint_path": "x.pth"}, "not both"),
        ({"pretrained": True}, "test_ravlt"),
        ({"checkpoint_path": "nowhere.pth"}, "nowhere.pth does not exist"),
    ],
)
def test_what_cannot_be_made(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        MultiScaleBackbone(**{"model": "test_ravlt", **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["test_ravlt", "test_lightnet"])
@pytest.mark.parametrize(
    ("out_indices", "message"),
    [((0, 7), "7 .*out of range"), ((1.0, 2), "1.0"), ((True,), "True"), (2.0, "2.0")],
)
def test_timms_own_maps_of_features_name_the_index(name, out_indices, message):
    with pytest.raises((ValueError, AssertionError), match=message):
        timm.create_model(name, features_only=True, out_indices=out_indices)
    for right in ((-2, 3), range(2, 4), 2):
        last = timm.create_model("test_ravlt", features_only=True, out_indices=right)
        assert last.feature_info.reduction() == [16, 32]


@pytest.fixture
def classifier():
    model = timm.create_model("test_ravlt", num_classes=5)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def same_weights(backbone, classifier) -> bool:
    weights = classifier.state_dict()
    return all(value.equal(weights[key]) for key, value in backbone.model.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize("out_indices", [(0, 1), (0, 1, 2, 3)])
def test_weights_from_a_file(classifier, tmp_path, prefix, out_indices):
    weights = {f"{prefix}{key}": value for key, value in classifier.state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "in.pth")
    backbone = MultiScaleBackbone(
        "test_ravlt", out_indices, checkpoint_path=tmp_path / "in.pth", frozen_stages=1
    )
    assert same_weights(backbone, classifier)
    overlay = {"file": str(tmp_path / "in.pth")}
    backbone = MultiScaleBackbone(
        "test_ravlt", out_indices, pretrained=True, pretrained_cfg_overlay=overlay
    )
    assert same_weights(backbone, classifier)


def test_channels_of_the_images_are_those_of_the_file(tmp_path):
    model = timm.create_model("test_ravlt", num_classes=5, in_chans=1)
    card = Card("test_ravlt", {}, 5, 1, data_config(model, {}), "L")
    save_weights(tmp_path / "grey.safetensors", model.state_dict(), card)
    path = tmp_path / "grey.safetensors"
    assert same_weights(MultiScaleBackbone("test_ravlt", checkpoint_path=path), model)
    with pytest.raises(CheckpointError, match="size mismatch"):
        MultiScaleBackbone("test_ravlt", checkpoint_path=path, in_chans=3)


def test_weights_in_the_keys_of_the_authors(tmp_path):
    released = upstream_state_dict(variants("rala")["RAVLT_T"]["state_dict"])
    detector = {f"backbone.{key}": value for key, value in released.items()}
    for weights in ({"model": released}, {"state_dict": detector}):
        torch.save(weights, tmp_path / "in.pth")
        backbone = MultiScaleBackbone("ravlt_t", checkpoint_path=tmp_path / "in.pth")
        stem = released["patch_embed.proj.0.weight"]
        assert backbone.model.stem.conv1.conv.weight.equal(stem.float())


def test_positions_are_resized_to_the_images_of_training(tmp_path):
    model = timm.create_model("test_inline_deit")
    torch.save(model.state_dict(), tmp_path / "in.pth")
    backbone = MultiScaleBackbone(
        "test_inline_deit", img_size=(64, 160), checkpoint_path=tmp_path / "in.pth"
    )
    assert backbone.model.pos_embed.shape[1] == 1 + 4 * 10
    assert backbone.model.blocks[0].attn.qkv.weight.equal(model.blocks[0].attn.qkv.weight)


def test_files_that_do_not_fit(classifier, tmp_path):
    path = tmp_path / "in.pth"
    weights = classifier.state_dict()
    for change, message in [
        ({"stages.0.blocks.0.norm1.weight": torch.ones(7)}, "size mismatch"),
        ({"stages.0.blocks.0.norm1.weight": None}, "Missing key"),
        ({"stages.0.blocks.9.norm1.weight": torch.ones(24)}, "of another model: 1 unexpected"),
    ]:
        changed = {k: v for k, v in {**weights, **change}.items() if v is not None}
        torch.save(changed, path)
        with pytest.raises(CheckpointError, match=message):
            MultiScaleBackbone("test_ravlt", checkpoint_path=path)
