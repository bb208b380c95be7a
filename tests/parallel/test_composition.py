"""Parallelised models under wrappers, recomputation, half precision and compilers."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.as_trained import make
from tests.parallel.comparing import LEAST, difference, loss_of, mesh_of_all
from tests.parallel.test_exact import check
from vitlinear.dense.backbone import MultiScaleBackbone
from vitlinear.parallel import gather_rows, parallelize, shard_rows

pytestmark = pytest.mark.process

LABELS = torch.tensor([3, 1])


def images_of(height: int = 105) -> torch.Tensor:
    """Two images."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, height, 80, generator=generator, dtype=torch.float64)


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of one process, of the mean loss of all images."""
    nn.functional.cross_entropy(model(images_of()), LABELS).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The worst relative difference."""
    return max(difference(found[name], x, LEAST) for name, x in expected.items())


def _data_parallel(name: str) -> float:
    """Two processes for each image, DDP around all: gradients are right as they are."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "rows"))
    model = make(name)
    expected = gradients_of(copy.deepcopy(model))
    wrapped = DistributedDataParallel(parallelize(model, mesh["rows"]))
    number = mesh.get_local_rank("data")
    shard, rows = shard_rows(images_of()[number : number + 1], mesh["rows"])
    with rows:
        loss = nn.functional.cross_entropy(wrapped(shard), LABELS[number : number + 1])
        loss.backward()
    return worst({name: p.grad for name, p in model.named_parameters()}, expected)


def test_distributed_data_parallel(four):
    assert max(four.run(_data_parallel, "test_ravlt_linear")) < 1e-10


def _fully_sharded(name: str) -> float:
    model = make(name)
    expected = gradients_of(copy.deepcopy(model))
    mesh = mesh_of_all()
    parallelize(model, mesh)
    for block in (block for blocks in model.blocks_by_stage() for block in blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    shard, rows = shard_rows(images_of(), mesh)
    with rows:
        nn.functional.cross_entropy(model(shard), LABELS).backward()
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return worst(found, expected)


def test_fully_sharded(two):
    assert max(two.run(_fully_sharded, "test_mavit_linear")) < 1e-10


def _compiled(name: str, height: int) -> tuple[float, float, int]:
    graphs = CompileCounterWithBackend("aot_eager")
    model = make(name, depths=(1, 0, 0, 0))
    reference = copy.deepcopy(model)
    mesh = mesh_of_all()
    parallelize(model, mesh)
    shard, rows = shard_rows(images_of(height), mesh)

    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    expected = nn.functional.cross_entropy(reference(images_of(height)), LABELS)
    expected.backward()
    with rows:
        loss = nn.functional.cross_entropy(compiled(shard), LABELS)
        loss.backward()
        compiled(shard)  # no second program
    found = {}
    for name, p in model.named_parameters():
        distributed.all_reduce(p.grad)
        found[name] = p.grad / mesh.size()
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    return difference(loss, expected), worst(found, gradients), graphs.frame_count


@pytest.mark.nightly
@pytest.mark.compile
def test_compiled_as_one_graph(two):
    for loss, gradients, graphs in two.run(_compiled, "test_mavit_linear", 105):
        assert (loss, gradients) == pytest.approx((0, 0), abs=1e-10)
        assert graphs == 1


def _half(name: str) -> tuple[float, bool]:
    model = make(name, torch.float32).train()
    reference = copy.deepcopy(model)
    mesh = mesh_of_all()
    parallelize(model, mesh)
    images = images_of().float()
    shard, rows = shard_rows(images, mesh)
    with rows, torch.autocast("cpu", torch.bfloat16):
        logits = model(shard)
        nn.functional.cross_entropy(logits, LABELS).backward()
    with torch.autocast("cpu", torch.bfloat16):
        expected = reference(images)
    finite = all(bool(p.grad.isfinite().all()) for p in model.parameters())
    return difference(logits.float(), expected.float()), finite


def test_half_precision(two):
    for error, finite in two.run(_half, "test_ravlt_linear"):
        assert error < 0.05 and finite  # bfloat16 has three digits, and training adds them up


def test_checkpointing_with_backward_outside(two):
    check(two, "test_mavit_linear", (50, 55), True, checkpointing=True)


def test_stochastic_depth_is_that_of_whole_images(two):
    check(two, "test_ravlt_linear", (64, 64), True, drop_path_rate=0.5)


@pytest.mark.parametrize("name", ["test_ravlt_linear", "test_lightnet"])
def test_fused_operators(two, name):
    check(two, name, (50, 55), attn_backend="library")


@pytest.mark.parametrize(
    ("name", "pool"),
    [
        ("test_linear_deit", "avgmax"),
        ("test_mavit", ""),
        pytest.param("test_linear_deit", "", marks=pytest.mark.nightly),
        pytest.param("test_linear_deit", "token", marks=pytest.mark.nightly),
        pytest.param("test_mavit", "max", marks=pytest.mark.nightly),
    ],
)
def test_poolings(two, name, pool):
    check(two, name, (64, 41), global_pool=pool)


def _copied() -> bool:
    model: Any = parallelize(make("test_mavit_linear"), mesh_of_all())
    shard, rows = shard_rows(images_of(), mesh_of_all())
    with rows, torch.no_grad():
        expected = model(shard)
        copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
        return all(torch.equal(other(shard), expected) for other in copies)


def test_copies_are_parallelised(two):
    assert all(two.run(_copied))


def _multi_scale(name: str) -> float:
    torch.manual_seed(0)
    model = MultiScaleBackbone(name, out_norms=True).double()
    reference = copy.deepcopy(model)
    mesh = mesh_of_all()
    parallelize(model, mesh)
    shard, rows = shard_rows(images_of(), mesh, sizes=(50, 55))
    expected = reference(images_of())
    loss_of(list(expected)).backward()
    with rows:
        found = [gather_rows(x, rows) for x in model(shard)]
        loss_of(found).backward()
    gradients = {}
    for key, p in model.named_parameters():
        distributed.all_reduce(p.grad)
        gradients[key] = p.grad / mesh.size()
    wanted = {key: p.grad for key, p in reference.named_parameters()}
    return max(*map(difference, found, expected), worst(gradients, wanted))


@pytest.mark.parametrize(
    "name", ["test_linear_deit", pytest.param("test_pola_swin", marks=pytest.mark.nightly)]
)
def test_maps_for_detectors(two, name):
    assert max(two.run(_multi_scale, name)) < 1e-10
