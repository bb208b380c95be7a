"""Which image comes when in an epoch, and the random numbers that it and each step are given.

Nothing random is carried from one step to the next. Every draw starts from a seed derived from the
run's seed, the epoch, and a place in it: augmentation from the image's place in the order over all
processes, mixing likewise, erasing and the model's own randomness from the number of the batch. So
an epoch is the same from any batch on, with any number of data workers, and a saved state needs no
random state. Augmentation, being a matter of places, is the same with any number of processes too.
"""

import hashlib
import random
import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset, Sampler
from torch.utils.data.distributed import DistributedSampler


def derive_seed(*parts: int | str) -> int:
    """Returns 63 bits that depend on every part; sums and products of numbers would collide."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def seed_everything(seed: int, devices: bool = True) -> None:
    """Seeds Python, numpy and torch.

    Args:
        seed: At most 63 bits.
        devices: Also the generators of GPUs; data workers have no business there.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if devices:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


class Place(NamedTuple):
    """The number of an image in the data set and the seed of its augmentation."""

    image: int
    seed: int


class SeededImages(Dataset):
    """A data set that is asked for `Place`s instead of indices."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: Place) -> Any:
        seed_everything(place.seed, devices=False)
        return self.dataset[place.image]


class EpochBatches(Sampler[list[Place]]):
    """Batches of this process's share of an epoch, whole ones only, from any batch on.

    Args:
        images: Size of the data set.
        batch_size: Images per batch and process.
        repeats: Augmentations of an image in an epoch that sees fewer images; 0 for none.
        rank: Of this process.
        world_size: Number of processes.
    """

    def __init__(
        self, images: int, batch_size: int, repeats: float = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        where = {"num_replicas": world_size, "rank": rank}
        self.sampler: RepeatAugSampler | DistributedSampler
        if repeats:
            self.sampler = RepeatAugSampler(range(images), num_repeats=repeats, **where)
        else:  # in one process too, for the same order as in several
            self.sampler = DistributedSampler(range(images), **where)  # type: ignore[arg-type]
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed = self.epoch = self.first = 0

    def start(self, seed: int, epoch: int, first: int = 0) -> None:
        """Sets the epoch that the next iteration yields, and its first batch."""
        self.seed, self.epoch, self.first = seed, epoch, first

    def __len__(self) -> int:
        """Batches in a whole epoch, wherever this one starts."""
        return len(self.sampler) // self.batch_size

    def __iter__(self) -> Iterator[list[Place]]:
        # The samplers shuffle by epoch number alone; two seeds should see two orders.
        self.sampler.set_epoch(derive_seed(self.seed, self.epoch, "order"))
        indices = list(self.sampler)
        for batch in range(self.first, len(self)):
            share = range(batch * self.batch_size, (batch + 1) * self.batch_size)
            yield [
                Place(
                    indices[number],
                    derive_seed(
                        self.seed, self.epoch, "image", number * self.world_size + self.rank
                    ),
                )
                for number in share
            ]


class SeededErasing:
    """Random erasing, which timm draws in the main process and one batch ahead of the model."""

    def __init__(self, erase: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.erase = erase
        self.seed: tuple[int, ...] = ()
        self.batch = 0

    def start(self, seed: int, epoch: int, rank: int, first: int) -> None:
        """Sets the epoch and the number of the next batch."""
        self.seed, self.batch = (seed, epoch, rank), first

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        seed_everything(derive_seed(*self.seed, "erase", self.batch))
        self.batch += 1
        return self.erase(images)


def seed_step(seed: int, epoch: int, batch: int, rank: int, row: int = 0) -> None:
    """Seeds what the model draws in one forward pass: stochastic depth, dropout.

    Args:
        seed: Of the run.
        epoch: Its number.
        batch: Its number in the epoch.
        rank: Of this process, among those that share the data.
        row: Of this process, among those that share images: each drops other places. The first one
            draws for all what is dropped of whole images.
    """
    seed_everything(derive_seed(seed, epoch, rank, "step", batch, *([row] if row else [])))


def start_worker(seed: Callable[[int], None], number: int) -> None:
    """Start of a data worker: its seeds, and signals left to the main process.

    A queue's notice goes to every process. It must not kill the workers, and the run with them,
    before the state is saved. A second SIGTERM does kill: the loader sends one to workers that do
    not end by themselves.

    Args:
        seed: timm's own start of a worker.
        number: Of the worker.
    """
    seed(number)

    def first(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, first)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
