"""Order and randomness of an epoch: from any batch on, in any number of processes."""

import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.data_sets.shards import write_shards
from tests.train.helpers import finish, start, tiny_loader
from vitlinear.data import dataset as data
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


def test_no_augmentation_is_no_mixing_and_no_repetition(folder: Path) -> None:
    """Whatever a recipe says of them."""
    found = loaded(folder, 0, *MIXED, "--aug-repeats", 3, "--no-aug")
    assert equal(found, loaded(folder, 0, "--no-aug"))
    assert all(labels.ndim == 1 for _, labels in found)


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


@pytest.fixture(
    params=[
        "forkserver",
        pytest.param("spawn", marks=(pytest.mark.slow, pytest.mark.nightly)),
    ]
)
def imports_anew(request: pytest.FixtureRequest) -> Iterator[None]:
    """Processes begin with imports, as they do by default on macOS and in Python 3.14."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def workers() -> set[int | None]:
    return {process.pid for process in multiprocessing.active_children()}


@pytest.mark.process
def test_workers_that_import_anew_are_kept(folder: Path, imports_anew: None) -> None:
    """The same processes in each epoch, which draw and mix as those of one epoch do."""
    kept, alone = (tiny_loader(folder, "-b", 4, *MIXED, "-j", number) for number in (1, 0))
    before, living = workers(), []
    for epoch, mixes in ((0, True), (1, True), (2, False), (0, False), (1, True)):
        found = []
        for batches in (kept, alone):
            batches.mixup_enabled = mixes
            loader.start_epoch(batches, seed=5, epoch=epoch)
            found.append(list(batches))
        assert equal(*found)
        mixed = min(float(target.max(1).values.min()) for _, target in found[0]) < 0.9
        assert mixed == mixes
        living.append(workers() - before)
    assert len(living[0]) == 1 and all(pids == living[0] for pids in living)


@pytest.mark.process
def test_kept_workers_draw_anew_from_a_stream(
    folder: Path, tmp_path: Path, imports_anew: None
) -> None:
    pytest.importorskip("webdataset", reason="pip install 'vitlinear[data]'")
    root = write_shards(folder, tmp_path / "shards")
    dataset = data.open_dataset(
        "wds/", train=True, mode="L", data_dir=str(root), batch_size=4, seed=1, num_classes=3
    )
    dataset.set_loader_cfg(num_workers=1)
    dataset.transform = Noise()
    batches = DataLoader(dataset, batch_size=4, num_workers=1, persistent_workers=True)
    epochs = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        epochs.append([float(value) for images, _ in batches for value in images])
    assert epochs[0] == epochs[2] != epochs[1]


class Noise:
    """Stands for augmentation, whose every draw counts."""

    def __call__(self, image: object) -> float:
        return float(np.random.rand() + torch.rand(()))


def test_forked_workers_end_with_the_epoch(folder: Path) -> None:
    assert multiprocessing.get_start_method() == "fork"
    before = workers()
    batches = tiny_loader(folder, "-b", 4, "-j", 1)
    loader.start_epoch(batches, seed=5, epoch=0)
    list(batches)
    assert workers() <= before


FAILS = """
import sys
from pathlib import Path
from tests.train.helpers import finish, start, tiny_loader
from vitlinear.data.loader import start_epoch

batches = tiny_loader(Path(sys.argv[1]), "-b", 4, "-j", 8)
start_epoch(batches, seed=0, epoch=0)
next(found := iter(batches))
raise RuntimeError("not a mistake of the user's")
"""


@pytest.mark.process
@pytest.mark.slow
def test_a_process_that_fails_does_not_wait_for_its_workers(folder: Path) -> None:
    """They do not heed a first SIGTERM, and at its exit Python sends but one."""
    code, text = finish(start([sys.executable, "-c", FAILS, folder]), timeout=300)
    assert code == 1 and "RuntimeError: not a mistake of the user's" in text
    assert "ignored" not in text  # nothing was raised while they were ended
