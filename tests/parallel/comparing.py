"""A model on the rows of several processes compared with the same model on the whole image."""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.as_trained import make
from vitlinear.parallel import gather_rows, parallelize, shard_rows

# Relative to the largest value. Gradients that cancel, such as those of biases before a batch norm,
# are compared with the least of what parameters have.
LEAST = 1e-3


def mesh_of_all() -> DeviceMesh:
    """All processes share an image."""
    return init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("rows",))


def difference(a: Tensor, b: Tensor, least: float = 1e-30) -> float:
    """The largest, over the largest value of b."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.double() - b.double()).abs().max() / b.abs().max().clamp(min=least))


def outputs_of(model: Any, images: Tensor, rows: Any) -> list[Tensor]:
    """Maps, features and logits; gathered, if the model sees rows."""
    features, maps = model.forward_intermediates(images)
    logits = model.forward_head(features)
    prefix = getattr(model, "num_prefix_tokens", 0)
    if rows is not None:
        maps = [gather_rows(x, rows) for x in maps]
        features = gather_rows(features, rows, prefix=prefix)
        if logits.dim() > 2:
            logits = gather_rows(logits, rows, prefix=prefix)
    return [*maps, features, logits]


def loss_of(outputs: list[Tensor]) -> Tensor:
    """A number that every value of every output has a part in."""
    generator = torch.Generator().manual_seed(1)
    weights = (torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs)
    terms = [(x * w).sum() / x.numel() ** 0.5 for x, w in zip(outputs, weights, strict=True)]
    return torch.stack(terms).sum()


def worst_differences(
    name: str, sizes: tuple[int, ...], training: bool, options: dict[str, Any]
) -> dict[str, float]:
    """The worst relative difference of outputs, of gradients, and of statistics.

    The model on the whole image runs in float64, whatever the type of the other: rounding of one
    process would add to what is measured. Some gradients cancel, such as those of a scale before a
    norm; there it is as large as that of several.

    Args:
        name: Of the model.
        sizes: Rows of each process.
        training: Run it in training mode.
        options: ``dtype`` of the model that sees rows, float64 by default; ``checkpointing``, with
            the backward pass outside of the rows; others of the model.
    """
    options = dict(options)
    dtype = options.pop("dtype", torch.float64)
    checkpointing = options.pop("checkpointing", False)
    torch.manual_seed(1)
    shape = (2, 3, sum(sizes), 80)
    images = torch.randn(shape, dtype=dtype).double()
    whole, parts = (make(name, dtype, **options).train(training) for _ in range(2))
    whole.double()
    images.requires_grad_()
    torch.manual_seed(2)
    expected = outputs_of(whole, images, None)
    loss_of(expected).backward()

    mesh = mesh_of_all()
    parts.set_grad_checkpointing(checkpointing)
    parallelize(parts, mesh)
    shard, rows = shard_rows(images.detach().to(dtype), mesh, sizes=sizes)
    shard.requires_grad_()
    torch.manual_seed(2)
    with rows:
        found = outputs_of(parts, shard, rows)
        loss = loss_of(found)
        if not checkpointing:
            loss.backward()
    if checkpointing:
        loss.backward()

    count = mesh.size()
    start, stop = rows.own
    assert {x.dtype for x in (*found, shard.grad)} == {dtype}
    worst = {"outputs": max(map(difference, found, expected))}
    worst["image"] = difference(shard.grad / count, images.grad[:, :, start:stop])
    gradients = []
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        distributed.all_reduce(ours.grad)
        gradients.append(difference(ours.grad / count, theirs.grad, LEAST))
    worst["parameters"] = max(gradients)
    pairs = zip(parts.buffers(), whole.buffers(), strict=True)
    worst["statistics"] = max((difference(a, b) for a, b in pairs), default=0.0)
    return worst
