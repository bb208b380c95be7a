"""Loaders over a data set, by timm's factory; training draws as `order` says."""

import atexit
import functools
import multiprocessing
import multiprocessing.util  # ends daemons at the exit, after what is registered here
import signal
from collections.abc import Iterator
from typing import Any

import torch
from timm.data import IterableImageDataset, create_loader
from timm.data.distributed_sampler import OrderedDistributedSampler
from torch.utils.data import DataLoader

from vitlinear.create import Preprocessing
from vitlinear.errors import UserError

from .augmentation import (
    AugmentationConfig,
    check_augmentation,
    make_mixing,
    repair_posterize,
    transform_options,
)
from .order import (
    EpochBatches,
    SeededErasing,
    SeededImages,
    derive_seed,
    seed_everything,
    start_worker,
)


def train_loader(
    dataset: Any,
    augmentation: AugmentationConfig,
    data_config: Preprocessing,
    num_classes: int,
    device: torch.device,
    *,
    batch_size: int,
    workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Any:
    """Builds timm's training loader, which draws as `order` says.

    Args:
        dataset: A data set that `open_dataset` returned.
        augmentation: Changes to its images.
        data_config: Input size and normalisation.
        num_classes: Classes of targets that are distributions.
        device: Where batches go.
        batch_size: Images in a batch of this process.
        workers: Processes that read images.
        pin_memory: Whether batches are put into pinned memory.
        rank: Of this process, among those that share the data.
        world_size: Number of processes that share the data.

    Raises:
        UserError: There is no whole batch, or data set and augmentation do not go together.
    """
    check_augmentation(augmentation, dataset.image_mode)
    repair_posterize()
    mixing = make_mixing(augmentation, batch_size, num_classes)
    iterable = isinstance(dataset, IterableImageDataset)
    if augmentation.repeats and iterable:
        raise UserError("--aug-repeats needs a data set with random access, not an iterable one")
    _share_stream(dataset, rank, world_size)
    loader = create_loader(
        dataset,
        input_size=data_config.input_size,
        batch_size=batch_size,
        is_training=True,
        **transform_options(augmentation),
        mean=data_config.mean,
        std=data_config.std,
        num_workers=workers,
        collate_fn=mixing,
        pin_memory=pin_memory,
        device=device,
        persistent_workers=keeps_workers(),
    )
    if loader.random_erasing is not None:
        loader.random_erasing = SeededErasing(loader.random_erasing)
    _leave_signals(loader)
    if not iterable:
        batches = EpochBatches(len(dataset), batch_size, augmentation.repeats, rank, world_size)
        dataset = SeededImages(loader.loader.dataset)
        loader.loader = _sampled(loader.loader, dataset, batch_sampler=batches)
    if len(loader) == 0:
        raise UserError(
            f"the training set has {len(dataset)} images, fewer than one batch of "
            f"{batch_size} in {world_size} process(es): lower --batch-size"
        )
    return loader


@atexit.register
def _end_workers() -> None:
    """Ends the data workers that are left when this process ends, say by an error.

    multiprocessing ends its daemons with one SIGTERM each, and waits. Workers do not heed the
    first, by `order.start_worker`: an error would hang the run for ever.
    """
    if hasattr(signal, "SIGCHLD"):  # PyTorch's handler raises an error for a worker that is killed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        while process.daemon and process.is_alive():
            process.terminate()
            process.join(0.05)


def keeps_workers() -> bool:
    """Whether data workers live as long as their loader, and not for an epoch.

    A forked worker starts at once. One that is spawned, or comes from a fork server, imports
    everything first, which takes longer than many an epoch.
    """
    return multiprocessing.get_start_method() != "fork"


def _share_stream(dataset: Any, rank: int, world_size: int) -> None:
    """Tells a reader of streams, which asks torch for all processes of the run, its share."""
    if isinstance(dataset, IterableImageDataset):
        dataset.reader.dist_rank, dataset.reader.dist_num_replicas = rank, world_size


def _leave_signals(loader: Any) -> None:
    loader.loader.worker_init_fn = functools.partial(start_worker, loader.loader.worker_init_fn)


def _sampled(loader: DataLoader, dataset: Any = None, **sampling: Any) -> DataLoader:
    """Returns the same loader with another choice of images.

    Args:
        loader: From timm.
        dataset: In place of its own.
        **sampling: Which images make a batch, in the terms of `DataLoader`.
    """
    return DataLoader(
        loader.dataset if dataset is None else dataset,
        **sampling,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        persistent_workers=loader.persistent_workers,
    )


def eval_loader(
    dataset: Any,
    *,
    batch_size: int,
    data_config: Preprocessing,
    workers: int,
    device: torch.device,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Any:
    """Builds timm's evaluation loader.

    Args:
        dataset: A data set that `open_dataset` returned.
        batch_size: Images in a batch of this process.
        data_config: Input size, crop and normalisation.
        workers: Processes that read images.
        device: Where batches go.
        pin_memory: Whether batches are put into pinned memory.
        rank: Of this process, among those that share the data.
        world_size: Number of processes that share the data.
    """
    _share_stream(dataset, rank, world_size)
    loader = create_loader(
        dataset,
        input_size=data_config.input_size,
        batch_size=batch_size,
        interpolation=data_config.interpolation,
        mean=data_config.mean,
        std=data_config.std,
        crop_pct=data_config.crop_pct,
        crop_mode=data_config.crop_mode,
        num_workers=workers,
        pin_memory=pin_memory,
        device=device,
        persistent_workers=keeps_workers(),
    )
    _leave_signals(loader)
    if world_size > 1 and not isinstance(dataset, IterableImageDataset):
        # timm's own, but not of all processes of the run
        loader.loader = _sampled(
            loader.loader,
            sampler=OrderedDistributedSampler(dataset, world_size, rank),
            batch_size=batch_size,
        )
    return loader


def start_epoch(loader: Any, seed: int, epoch: int, rank: int = 0, first: int = 0) -> None:
    """Makes the next iteration of a training loader the given epoch.

    Args:
        loader: From `train_loader`.
        seed: Of the run.
        epoch: Number, from 0.
        rank: Of this process, among those that share the data.
        first: Batch to begin with. An iterable data set has no random access: it begins with the
            first, and `batches_from` reads on to this one.
    """
    seed_everything(derive_seed(seed, epoch, rank, "epoch"))  # iterable sets shuffle from here
    if isinstance(loader.batch_sampler, EpochBatches):
        loader.batch_sampler.start(seed, epoch, first)
    elif hasattr(loader.dataset, "set_epoch"):
        loader.dataset.set_epoch(epoch)
        first = 0
    if loader.random_erasing is not None:
        loader.random_erasing.start(seed, epoch, rank, first)


def batches_from(loader: Any, first: int) -> Iterator[tuple[int, Any]]:
    """Yields (number, batch) of the epoch set by `start_epoch`, from batch ``first`` on.

    An iterable data set knows its length by estimate: what it holds beyond ``len(loader)`` batches
    is left out.
    """
    seeks = isinstance(getattr(loader, "batch_sampler", None), EpochBatches)
    numbers = range(first if seeks else 0, len(loader))
    for number, batch in zip(numbers, loader, strict=False):
        if number >= first:
            yield number, batch
