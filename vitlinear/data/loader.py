"""Loaders over a data set, by timm's factory; training draws as `order` says."""

import argparse
import functools
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import FastCollateMixup, IterableImageDataset, auto_augment, create_loader
from torch.utils.data import DataLoader

from vitlinear.errors import UserError

from .order import (
    EpochBatches,
    SeededErasing,
    SeededImages,
    derive_seed,
    seed_everything,
    start_worker,
)


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keeps the ``bits`` highest bits of each channel; none of them gives black.

    timm's ``-inc`` policies ask for 0 bits at their greatest strength (one image in some hundreds
    with rand-m9-mstd0.5-inc1). Pillow took that for black until its version 13 raised an error.
    """
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits >= 1 else image.point(lambda _: 0)


def _repair_posterize() -> None:
    for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        auto_augment.NAME_TO_OP[name] = posterize


def train_loader(
    dataset: Any,
    args: argparse.Namespace,
    data_config: dict[str, Any],
    num_classes: int,
    device: torch.device,
) -> Any:
    """Builds timm's training loader, with mixing and repeated augmentation as asked for."""
    _repair_posterize()
    mixing = args.mixup > 0 or args.cutmix > 0
    if mixing and args.batch_size % 2:
        raise UserError(f"mixup and cutmix need an even --batch-size, got {args.batch_size}")
    collate = None
    if mixing:
        collate = FastCollateMixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=num_classes,
        )
    iterable = isinstance(dataset, IterableImageDataset)
    if args.aug_repeats and iterable:
        raise UserError("--aug-repeats needs a data set with random access, not an iterable one")
    loader = create_loader(
        dataset,
        input_size=data_config["input_size"],
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,
        mean=data_config["mean"],
        std=data_config["std"],
        num_workers=args.workers,
        collate_fn=collate,
        pin_memory=args.pin_mem,
        device=device,
        persistent_workers=False,
    )
    if loader.random_erasing is not None:
        loader.random_erasing = SeededErasing(loader.random_erasing)
    _leave_signals(loader)
    if not iterable:
        batches = EpochBatches(
            len(dataset), args.batch_size, args.aug_repeats, args.rank, args.world_size
        )
        loader.loader = _from_places(loader.loader, batches)
    if len(loader) == 0:
        raise UserError(
            f"the training set has {len(dataset)} images, fewer than one batch of "
            f"{args.batch_size} in {args.world_size} process(es): lower --batch-size"
        )
    return loader


def _leave_signals(loader: Any) -> None:
    loader.loader.worker_init_fn = functools.partial(start_worker, loader.loader.worker_init_fn)


def _from_places(loader: DataLoader, batches: EpochBatches) -> DataLoader:
    """Returns the same loader, drawing as `order` says."""
    return DataLoader(
        SeededImages(loader.dataset),
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
    )


def eval_loader(
    dataset: Any,
    *,
    batch_size: int,
    data_config: dict[str, Any],
    workers: int,
    device: torch.device,
    distributed: bool = False,
    pin_memory: bool = False,
) -> Any:
    """Builds timm's evaluation loader."""
    loader = create_loader(
        dataset,
        input_size=data_config["input_size"],
        batch_size=batch_size,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"],
        num_workers=workers,
        distributed=distributed,
        pin_memory=pin_memory,
        device=device,
        persistent_workers=False,
    )
    _leave_signals(loader)
    return loader


def start_epoch(loader: Any, seed: int, epoch: int, rank: int = 0, first: int = 0) -> None:
    """Makes the next iteration of a training loader the given epoch.

    Args:
        loader: From `train_loader`.
        seed: Of the run.
        epoch: Number, from 0.
        rank: Of this process.
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
