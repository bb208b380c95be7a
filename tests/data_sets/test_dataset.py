"""Data sets and loaders."""

import gzip
import hashlib
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from tests.train.helpers import CLASSES, image_folder, tiny_loader
from vitlinear.data import dataset as data
from vitlinear.data import loader, sources
from vitlinear.data.augmentation import posterize, repair_posterize
from vitlinear.data.class_names import check_same_classes, classes_of
from vitlinear.errors import UserError


def test_digits_split_is_fixed_stratified_and_disjoint() -> None:
    from sklearn.datasets import load_digits

    train, held_out = sources.digits(True), sources.digits(False)
    assert (len(train), len(held_out)) == (1438, 359)
    everything = np.bincount(load_digits().target)
    counts = np.bincount(held_out.labels)
    assert counts.tolist() == [round(count / 5) for count in everything]
    together = np.concatenate([train.images, held_out.images]).reshape(1797, 64)
    original = np.round(load_digits().images * (255 / 16)).astype(np.uint8).reshape(1797, 64)
    assert sorted(map(bytes, together)) == sorted(map(bytes, original))
    # Pins the split itself: numbers in the README hold for these images.
    assert hashlib.sha256(held_out.images.tobytes()).hexdigest()[:16] == "2f5eb12f1dfec8a2"


@pytest.mark.parametrize("name", ["digits", "fashion_mnist"])
@pytest.mark.parametrize(
    ("train", "split", "flag"),
    [(True, "test", "--train-split"), (False, "train", "--val-split"), (False, "", "--val-split")],
)
def test_a_split_that_an_embedded_set_does_not_have(
    name: str, train: bool, split: str, flag: str
) -> None:
    """Its images would be of the other part, without a word."""
    with pytest.raises(UserError, match=f"{flag} {split}: {name} has one part to train on"):
        data.open_source(name, train=train, mode="L", split=split)


def idx(array: np.ndarray) -> bytes:
    """The IDX format, from its definition."""
    return (
        bytes([0, 0, 8, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + (array.astype(np.uint8).tobytes())
    )


def write_fashion(root: Path, zipped: bool, count: int = 7) -> None:
    random = np.random.RandomState(0)
    root.mkdir(parents=True, exist_ok=True)
    for prefix in ("train", "t10k"):
        parts = {
            "images-idx3-ubyte": random.randint(0, 256, (count, 28, 28)),
            "labels-idx1-ubyte": np.arange(count) % 10,
        }
        for name, array in parts.items():
            raw = idx(array)
            path = root / f"{prefix}-{name}{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(raw) if zipped else raw)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
def test_fashion_mnist_is_what_torchvision_reads(tmp_path: Path, zipped: bool, below: str) -> None:
    write_fashion(tmp_path / below, zipped)
    source = sources.fashion_mnist(True, tmp_path)
    assert len(source) == 7 and source.read(3)[1] == 3 and source.read(0)[0].size == (28, 28)
    if below and not zipped:
        from torchvision.datasets import FashionMNIST

        theirs = FashionMNIST(str(tmp_path), train=True)
        assert list(theirs.classes) == list(source.classes or ())
        assert np.array_equal(np.asarray(theirs[4][0]), np.asarray(source.read(4)[0]))


def test_damaged_fashion_mnist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no train-images-idx3-ubyte\[.gz\].*apt install"):
        sources.fashion_mnist(True, tmp_path)
    write_fashion(tmp_path, zipped=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot read .*train-images-idx3-ubyte.gz"):
        sources.fashion_mnist(True, tmp_path)
    path.unlink()
    path.with_suffix("").write_bytes(idx(np.zeros((7, 28, 28)))[:-1])
    with pytest.raises(UserError, match="train-images-idx3-ubyte is truncated"):
        sources.fashion_mnist(True, tmp_path)
    path.with_suffix("").write_bytes(idx(np.zeros((6, 28, 28))))
    with pytest.raises(UserError, match="disagree"):
        sources.fashion_mnist(True, tmp_path)


@pytest.mark.quick("data")
def test_folder_classes_and_modes(folder: Path) -> None:
    train = data.open_dataset(None, train=True, mode="L", data_dir=str(folder))
    held_out = data.open_dataset("", train=False, mode="L", data_dir=str(folder))
    assert (len(train), len(held_out)) == (24, 9)
    assert classes_of(train) == list(CLASSES) == classes_of(held_out)
    image, label = train[23]
    assert (image.mode, label) == ("L", 2)


def test_folder_mistakes_are_named(tmp_path: Path) -> None:
    def opened(root: Path) -> None:
        data.open_dataset(None, train=True, mode="RGB", data_dir=str(root))

    with pytest.raises(UserError, match="nowhere does not exist"):
        opened(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no 'train' folder in"):
        opened(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="no class folders in .*train"):
        opened(tmp_path)
    (tmp_path / "train" / "dog").mkdir()
    (tmp_path / "train" / "dog" / "notes.txt").touch()
    with pytest.raises(UserError, match="class folder .*dog holds no images"):
        opened(tmp_path)


@pytest.mark.quick("data")
def test_tars_and_folders_of_classes(folder: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            tar.add(folder / split, arcname=".")
    train = data.open_dataset(None, train=True, mode="RGB", data_dir=str(tmp_path))
    loose = data.open_dataset(None, train=True, mode="RGB", data_dir=str(folder))
    assert classes_of(train) == list(CLASSES) and len(train) == len(loose)
    assert np.array_equal(np.asarray(train[9][0]), np.asarray(loose[9][0]))
    with pytest.raises(UserError, match="train.tar holds one split, training needs two"):
        data.open_dataset(None, train=True, mode="L", data_dir=str(tmp_path / "train.tar"))
    for where, split in ((tmp_path / "val.tar", None), (folder / "val", "")):
        held_out = data.open_dataset(None, train=False, mode="L", data_dir=str(where), split=split)
        assert len(held_out) == 9
    (tmp_path / "train.tar").write_bytes((tmp_path / "train.tar").read_bytes()[:700])
    with pytest.raises(UserError, match="cannot open .*train.tar"):
        data.open_dataset(None, train=True, mode="RGB", data_dir=str(tmp_path))


@pytest.mark.parametrize("damage", ["truncated", "not an image"])
def test_unreadable_image_is_named(tmp_path: Path, damage: str) -> None:
    root = image_folder(tmp_path / "images")
    path = root / "train" / "bee" / "3.png"
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2] if damage == "truncated" else b"hello")
    dataset = data.open_dataset(None, train=True, mode="RGB", data_dir=str(root))
    with pytest.raises(UserError, match=r"cannot read .*bee/3\.png.*replace or remove it"):
        dataset[11]
    assert dataset[10][1] == 1


def test_torchvision_data_sets_come_in_the_mode_asked_for(tmp_path: Path) -> None:
    write_fashion(tmp_path / "FashionMNIST/raw", zipped=False)
    dataset = data.open_dataset(
        "torch/fashion_mnist", train=True, mode="RGB", data_dir=str(tmp_path)
    )
    assert dataset[0][0].mode == "RGB" and len(classes_of(dataset) or ()) == 10


def test_class_folders_where_a_torchvision_data_set_was_asked_for(tmp_path: Path) -> None:
    """Only where the split has some is reading them the way out."""
    for folder, more in (("train", ""), ("train/ant", ". To read the folders there, leave --da")):
        (tmp_path / folder).mkdir()
        with pytest.raises(UserError, match="cannot open data set torch/cifar10") as error:
            data.open_dataset("torch/cifar10", train=True, mode="RGB", data_dir=str(tmp_path))
        assert ("To read" in str(error.value)) == bool(more) and more in str(error.value)


@pytest.mark.quick("data")
@pytest.mark.parametrize(("channels", "asked", "mode"), [(1, None, "L"), (4, "RGBA", "RGBA")])
def test_image_mode(channels: int, asked: str | None, mode: str) -> None:
    assert data.image_mode(channels, asked) == mode


@pytest.mark.parametrize(
    ("channels", "asked", "message"),
    [(5, None, "no default image mode"), (3, "L", "has 1 channels"), (3, "XYZ", "unknown")],
)
def test_impossible_image_mode(channels: int, asked: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        data.image_mode(channels, asked)


def loaded(folder: Path, seed: int, epoch: int, *flags: object) -> list[torch.Tensor]:
    """One epoch of a training loader."""
    batches = tiny_loader(folder, *flags)
    loader.start_epoch(batches, seed, epoch)
    return [part for batch in batches for part in batch]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_depends_on_seed_and_number_alone(folder: Path, workers: int) -> None:
    flags = ("-j", workers, "--aa", "rand-m9-mstd0.5-inc1", "--reprob", 0.5, "--mixup", 0.8)
    flags += ("--cutmix", 1.0)
    first = loaded(folder, 1, 3, *flags)
    torch.rand(7), np.random.rand(3)  # whatever ran before must not matter
    second = loaded(folder, 1, 3, *flags)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for other in (loaded(folder, 1, 4, *flags), loaded(folder, 2, 3, *flags)):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert first[1].shape == (8, 3) and torch.allclose(first[1].sum(1), torch.ones(8))


def test_repeated_augmentation_in_one_process(folder: Path) -> None:
    batches = loaded(folder, 0, 0, "--aug-repeats", 3, "-b", 6)
    for images, labels in zip(batches[::2], batches[1::2], strict=True):
        for start in (0, 3):  # three augmentations of one image follow each other
            assert len(set(labels[start : start + 3].tolist())) == 1
            assert not torch.equal(images[start], images[start + 1])
    assert not torch.equal(batches[0], loaded(folder, 1, 0, "--aug-repeats", 3, "-b", 6)[0])


def test_loader_refuses_what_it_cannot_do(folder: Path) -> None:
    with pytest.raises(UserError, match="24 images, fewer than one batch of 64"):
        loaded(folder, 0, 0, "-b", 64)
    with pytest.raises(UserError, match="even --batch-size, got 7"):
        loaded(folder, 0, 0, "-b", 7, "--mixup", 0.2)


def test_export_sample(tmp_path: Path) -> None:
    label = data.export_sample("digits", 5, tmp_path / "digit.png")
    with Image.open(tmp_path / "digit.png") as image:
        pixels = np.asarray(image)
    held_out = sources.digits(False)
    assert label == str(held_out.labels[5])
    assert np.array_equal(pixels, held_out.images[5])
    with pytest.raises(UserError, match="no image 359: it holds 359"):
        data.export_sample("digits", 359, tmp_path / "none.png")


@pytest.mark.quick("data")
def test_class_lists_must_agree() -> None:
    check_same_classes(["a"], ["a"], "x", "y")
    check_same_classes(None, ["a"], "x", "y")
    with pytest.raises(UserError, match="x has 1 classes, y 2: not in both: b"):
        check_same_classes(["a"], ["a", "b"], "x", "y")
    with pytest.raises(UserError, match="same names in another order"):
        check_same_classes(["a", "b"], ["b", "a"], "x", "y")


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_posterize_at_full_strength_is_black(mode: str) -> None:
    """timm asks for 0 bits there, which Pillow 13 refuses."""
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert(mode)
    assert np.asarray(posterize(image, 0)).max() == 0
    assert np.array_equal(np.asarray(posterize(image, 3)), np.asarray(image) & 0b11100000)
    assert posterize(image, 8) is image
    repair_posterize()
    op = auto_augment.AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10)
    assert np.asarray(op(image)).max() == 0
