"""Loaders over a data set, by timm's factory, and the randomness of an epoch.

Everything random in an epoch (order, augmentation, mixing) follows from the seed that
`start_epoch` sets, so an epoch is the same whether the run reached it or resumed there.
"""

import argparse
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import FastCollateMixup, IterableImageDataset, auto_augment, create_loader
from timm.data.distributed_sampler import RepeatAugSampler
from timm.utils import random_seed
from torch.utils.data import DataLoader

from vitlinear.errors import UserError


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
        num_aug_repeats=args.aug_repeats if args.distributed else 0,
        interpolation=args.train_interpolation,
        mean=data_config["mean"],
        std=data_config["std"],
        num_workers=args.workers,
        distributed=args.distributed,
        collate_fn=collate,
        pin_memory=args.pin_mem,
        device=device,
        # Workers that live through an epoch boundary keep a random state no checkpoint can hold.
        persistent_workers=False,
    )
    if args.aug_repeats and not args.distributed:
        loader.loader = _with_sampler(
            loader.loader,
            RepeatAugSampler(dataset, num_replicas=1, rank=0, num_repeats=args.aug_repeats),
        )
    if len(loader) == 0:
        raise UserError(
            f"the training set has {len(dataset)} images, fewer than one batch of "
            f"{args.batch_size}: lower --batch-size"
        )
    return loader


def _with_sampler(loader: DataLoader, sampler: RepeatAugSampler) -> DataLoader:
    """Returns the same loader over another sampler.

    timm's factory repeats augmentations only between processes; the sampler itself works in one.
    """
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=sampler,
        drop_last=loader.drop_last,
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
    return create_loader(
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


def start_epoch(loader: Any, seed: int, epoch: int, rank: int = 0) -> None:
    """Sets every source of randomness of one epoch: process, workers (seeded from it), samplers.

    The samplers of timm and torch shuffle by epoch number alone; giving them a number that holds
    the seed too makes two seeds see two orders. Ranks share the order and differ in the rest.
    """
    number = (seed * 1_000_003 + epoch) % 2**31
    random_seed(number, rank)
    for part in (loader.sampler, loader.dataset):
        if hasattr(part, "set_epoch"):
            part.set_epoch(number if part is loader.sampler else epoch)
