"""Order and randomness of an epoch: from any batch on, in any number of processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.train.helpers import tiny_loader
from vitlinear.data import loader
from vitlinear.data.order import EpochBatches, Place, SeededErasing, derive_seed

MIXED = ("--aa", "rand-m9-mstd0.5-inc1", "--reprob", 0.5, "--mixup", 0.8, "--cutmix", 1.0)


def loaded(
    folder: Path, first: int, *flags: object, rank: int = 0, world_size: int = 1
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """An epoch of a training loader from batch ``first`` on."""
    batches = tiny_loader(folder, "-b", 4, *flags, rank=rank, world_size=world_size)
    loader.start_epoch(batches, seed=5, epoch=2, rank=rank, first=first)
    numbers, found = zip(*loader.batches_from(batches, first), strict=True)
    assert list(numbers) == list(range(first, len(batches)))
    return list(found)


def equal(
    first: list[tuple[torch.Tensor, torch.Tensor]], second: list[tuple[torch.Tensor, torch.Tensor]]
) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("flags", [MIXED, ("--aug-repeats", 3)], ids=["mixed", "repeated"])
def test_an_epoch_can_be_entered_anywhere_with_any_number_of_workers(
    folder: Path, flags: tuple[object, ...]
) -> None:
    whole = loaded(folder, 0, *flags, "-j", 0)
    for workers in (0, 1, 2):
        assert equal(loaded(folder, 4, *flags, "-j", workers), whole[4:])
    assert not equal(whole[:1], whole[1:2])


@pytest.mark.parametrize("flags", [(), ("--aug-repeats", 3)], ids=["plain", "repeated"])
def test_processes_share_the_images_of_one(folder: Path, flags: tuple[object, ...]) -> None:
    """Image j of process r is image 2 j + r of one with the doubled batch, augmented alike."""
    aug = ("--aa", "rand-m9-mstd0.5-inc1", *flags)
    alone = loaded(folder, 1, *aug, "-b", 8)
    parts = [loaded(folder, 1, *aug, rank=rank, world_size=2) for rank in (0, 1)]
    for number, (images, labels) in enumerate(alone):
        for rank in (0, 1):
            assert torch.equal(parts[rank][number][0], images[rank::2])
            assert torch.equal(parts[rank][number][1], labels[rank::2])


def test_what_an_iterable_set_holds_beyond_its_estimate_is_left_out() -> None:
    drawn = []

    class Estimated:
        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Iterator[int]:
            for item in range(9):
                drawn.append(item)
                yield item

    assert list(loader.batches_from(Estimated(), 1)) == [(1, 1), (2, 2)]
    assert drawn == [0, 1, 2], "a batch that is not used is not waited for"


def test_seeds_are_spread() -> None:
    seeds = {derive_seed(a, b, "image", c) for a in range(9) for b in range(9) for c in range(99)}
    assert len(seeds) == 9 * 9 * 99 and max(seeds) < 2**63
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed(42, 0, "order") == 7803073313139403761, "or no old run can be resumed"


def test_batches_are_whole_and_cover_the_epoch() -> None:
    batches = EpochBatches(23, 4)
    batches.start(seed=0, epoch=0)
    epoch = list(batches)
    assert len(epoch) == len(batches) == 5
    images = [place.image for batch in epoch for place in batch]
    assert len(set(images)) == 20 and images != sorted(images)
    assert len({place.seed for batch in epoch for place in batch}) == 20
    assert isinstance(epoch[0][0], Place)
    batches.start(seed=0, epoch=1)
    assert [place.image for batch in batches for place in batch] != images


def test_erasing_draws_by_the_number_of_the_batch() -> None:
    erasing = SeededErasing(lambda images: images + torch.rand(()))
    erasing.start(seed=1, epoch=0, rank=0, first=0)
    whole = [erasing(torch.zeros(1)).item() for _ in range(4)]
    erasing.start(seed=1, epoch=0, rank=0, first=2)
    torch.manual_seed(0)
    assert [erasing(torch.zeros(1)).item() for _ in range(2)] == whole[2:]
    assert len(set(whole)) == 4
