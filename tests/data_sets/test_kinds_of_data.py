"""Every kind of data set is trained on for an epoch and validated, from local files."""

import importlib.util
import json
import signal
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tests.data_sets.shards import write_shards
from tests.train.helpers import CLASSES, TINY_FLAGS, two_processes
from vitlinear.checkpoints.card import read_card
from vitlinear.checkpoints.load import read_weights
from vitlinear.data import dataset as data
from vitlinear.data.class_names import classes_of
from vitlinear.errors import UserError, pip_install
from vitlinear.evaluation import validate
from vitlinear.signals import Stopped, StopSignals
from vitlinear.train import run
from vitlinear_cli import main

pytest.importorskip("datasets", reason="pip install 'vitlinear[data]'")
pytest.importorskip("webdataset", reason="pip install 'vitlinear[data]'")


@pytest.fixture(autouse=True)
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is looked up on the hub, and no cache of the user's is touched."""
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf-cache"))


def write_parquet(folder: Path, root: Path) -> Path:
    """Two parquet files as the hub has them: images inside, classes named."""
    import datasets

    root.mkdir()
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )
    for split, name in (("train", "train"), ("val", "validation")):
        files = sorted((folder / split).glob("*/*.png"))
        rows = {
            "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
            "label": [CLASSES.index(file.parent.name) for file in files],
        }
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(root / f"{name}-00000-of-00001.parquet"))
    return root


def write_cifar(root: Path) -> Path:
    """torchvision's layout of CIFAR-10, five batches of four images; its checksums are patched."""
    import pickle

    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    random = np.random.RandomState(0)
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        labels = list(range(4))
        rows = random.randint(0, 256, (4, 3072)).astype(np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": rows, "labels": labels}))
    names = [f"class{number}" for number in range(10)]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return root


def make(kind: str, folder: Path, root: Path) -> list[str]:
    """Writes a data set of a kind and returns the flags that mean it."""
    if kind == "folder":
        return ["--data-dir", str(folder)]
    if kind == "tar":
        for split in ("train", "val"):
            with tarfile.open(root / f"{split}.tar", "w") as tar:
                tar.add(folder / split, arcname=".")
        return ["--data-dir", str(root)]
    if kind == "wds":
        return ["--dataset", "wds/", "--data-dir", str(write_shards(folder, root / "shards"))]
    if kind == "wds without info":
        where = write_shards(folder, root / "shards", info=False)
        flags = ["--dataset", "wds/", "--data-dir", str(where)]
        return [*flags, "--val-split", "val-{0000..0001}.tar|9"]
    if kind == "hfds folder":
        return ["--dataset", f"hfds/{folder}"]
    if kind == "hfds parquet":
        return ["--dataset", f"hfds/{write_parquet(folder, root / 'parquet')}"]
    if kind == "torch folder":
        return ["--dataset", "torch/image_folder", "--data-dir", str(folder)]
    if kind == "torch cifar10":
        return ["--dataset", "torch/cifar10", "--data-dir", str(write_cifar(root))]
    raise AssertionError(kind)


KINDS = ("folder", "tar", "wds", "wds without info", "hfds folder", "hfds parquet")
KINDS += ("torch folder", "torch cifar10")


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_validate(
    kind: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    flags = make(kind, folder, tmp_path)
    train = [*flags, "--output", str(tmp_path / "run"), *TINY_FLAGS, "-b", "4", "-j", "0"]
    train += ["--epochs", "1", "--warmup-epochs", "0", "--lr", "1e-3", "--no-plot"]
    names: list[str] | None = list(CLASSES)
    if kind.startswith("wds"):
        names = None
        flags += ["--num-classes", "3"]
        train += ["--num-classes", "3"]
    if kind == "wds without info":
        train += ["--train-split", "train-{0000..0001}.tar|24"]
    images = 4 if kind == "torch cifar10" else 9
    assert main(["train", *train]) == 0, capfd.readouterr().err
    checkpoint = ["--checkpoint", str(tmp_path / "run" / "last.safetensors"), "-j", "2"]
    results = tmp_path / "results.json"
    validation = ["validate", *checkpoint, *flags, "--results-file", str(results)]
    assert main(validation) == 0, capfd.readouterr().err
    assert f" on {images} images" in capfd.readouterr().out
    (row,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    loss = json.loads(results.read_text())["loss"]
    assert loss == pytest.approx(row["eval_loss"], abs=1e-6)
    if kind == "torch cifar10":  # its name is known, its place is not
        args = validate.parse_arguments([*checkpoint, *flags[2:]])
        assert validate.validate(args)["loss"] == pytest.approx(row["eval_loss"], abs=1e-6)
    else:
        card = read_card(tmp_path / "run" / "last.safetensors")
        assert card is not None and card.class_names == names


def names_read(root: Path, train: bool, workers: int, epoch: int = 0, **options: Any) -> list[str]:
    """Names of the samples of an epoch, in the order in which a loader would get them."""
    options = {"batch_size": 4, "seed": 1, "num_classes": 3} | options
    dataset = data.open_dataset("wds/", train=train, mode="RGB", data_dir=str(root), **options)
    dataset.set_loader_cfg(num_workers=workers)
    dataset.set_epoch(epoch)
    names: list[str] = []

    dataset.transform = lambda image: torch.from_numpy(np.asarray(image).copy())
    loaded = DataLoader(dataset, batch_size=4, num_workers=workers)
    for images, labels in loaded:
        assert images.shape[1:] == (32, 32, 3)
        names += [f"{label} {image.sum()}" for image, label in zip(images, labels, strict=True)]
    return names


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_of_shards(folder: Path, tmp_path: Path, workers: int) -> None:
    root = write_shards(folder, tmp_path / "shards")
    held_out = names_read(root, False, workers)
    assert len(held_out) == len(set(held_out)) == 9
    first = names_read(root, True, workers, epoch=0)
    assert len(first) == 24 and set(first) == set(names_read(root, True, 0))
    again = names_read(root, True, workers, epoch=0)
    assert first == again
    assert first != names_read(root, True, workers, epoch=1)
    assert first != names_read(root, True, workers, seed=2)


def test_an_epoch_repeats_in_one_process_after_others(folder: Path, tmp_path: Path) -> None:
    """timm's order of a process without workers goes on where the epoch before ended."""
    root = write_shards(folder, tmp_path / "shards")
    dataset = data.open_dataset(
        "wds/", train=True, mode="RGB", data_dir=str(root), batch_size=4, seed=1
    )
    epochs = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        epochs.append([(image.tobytes(), label) for image, label in dataset])
    assert epochs[0] == epochs[2] != epochs[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, r"cannot open .*--val-split test.*split test not found"),
        ({"split": "val-{0000..0001}.tar"}, r"how many images.*tar\|NUMBER"),
        ({"split": "val-{0000..0002}.tar|9"}, "there is no shard .*val-0002.tar"),
        ({"target_key": "species"}, "ant_0 has no label.*'species' in a .json"),
        ({"target_key": "name"}, "ant_0 has no label.*--class-map"),
        ({"input_key": "tif"}, "ant_0 holds png, cls, json, none of tif: name it by --input-key"),
        ({"num_classes": 2}, "cat_.* has the label 2, but there are only 2 classes, 0 to 1"),
    ],
)
def test_mistakes_with_shards(
    folder: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    root = write_shards(folder, tmp_path / "shards")
    with pytest.raises(UserError, match=message):
        names_read(root, False, 0, **options)


def test_damaged_and_too_few_shards(folder: Path, tmp_path: Path) -> None:
    root = write_shards(folder, tmp_path / "shards")
    with pytest.raises(UserError, match="2 training shards are too few for 3 data workers"):
        names_read(root, True, 3)
    shard = root / "val-0001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:2000])
    with pytest.raises(UserError, match="cannot read shard .*val-0001.tar: .*fetch it again"):
        names_read(root, False, 0)
    info = (root / "_info.json").read_text()
    shard.write_bytes(whole)
    (root / "_info.json").write_text(info.replace("[5, 4]", "[5, 7]"))
    with pytest.raises(UserError, match="val-0001.tar holds 4 samples, its description says 7"):
        names_read(root, False, 0)


@pytest.mark.parametrize("key", [None, "name", "number"])
def test_class_map_names_the_classes_of_shards(folder: Path, tmp_path: Path, key: Any) -> None:
    root = write_shards(folder, tmp_path / "shards")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    dataset = data.open_dataset(
        "wds/", train=False, mode="L", data_dir=str(root), target_key=key,
        class_map=str(tmp_path / "classes.txt"),
    )  # fmt: skip
    assert classes_of(dataset) == list(CLASSES)
    assert sorted(label for _, label in dataset) == [0] * 3 + [1] * 3 + [2] * 3


def test_mistakes_with_hugging_face_data(folder: Path, tmp_path: Path) -> None:
    where = write_parquet(folder, tmp_path / "parquet")

    def opened(name: str, **options: Any) -> Any:
        return data.open_dataset(name, train=False, mode="RGB", **options)

    with pytest.raises(UserError, match="--val-split test.*Unknown split"):
        opened(f"hfds/{where}", split="test")
    with pytest.raises(UserError, match="cannot open data set hfds/.*nowhere"):
        opened(f"hfds/{tmp_path / 'nowhere'}")
    with pytest.raises(UserError, match="no column 'img', only image, label: name it by --input"):
        opened(f"hfds/{where}", input_key="img")
    with pytest.raises(UserError, match="no column 'fine', only image, label: name it by --target"):
        opened(f"hfds/{where}", target_key="fine")
    assert opened(f"hfds/{where}", num_classes=3)[8][1] == 2


def test_hugging_face_data_without_images_labels_or_classes(folder: Path, tmp_path: Path) -> None:
    import datasets

    raw = (folder / "val/ant/0.png").read_bytes()
    picture = {"bytes": raw, "path": None}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    (tmp_path / "data").mkdir()
    rows = {"image": [picture, None], "label": ["ant", "bee"]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(
        str(tmp_path / "data" / "validation-00000-of-00001.parquet")
    )
    (tmp_path / "classes.txt").write_text("ant\nbee\n")

    def opened(**options: Any) -> Any:
        name = f"hfds/{tmp_path}"
        return data.open_dataset(name, train=False, mode="RGB", **options)

    with pytest.raises(UserError, match="number 0 has the label 'ant'.*--class-map"):
        opened()[0]
    named = opened(class_map=str(tmp_path / "classes.txt"))
    assert named[0][1] == 0 and classes_of(named) == ["ant", "bee"]
    with pytest.raises(UserError, match="cannot read image number 1: no image is stored here"):
        named[1]


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [
        ("wds/", "webdataset", pip_install("data")),
        ("hfds/x", "datasets", pip_install("data")),
        ("tfds/mnist", "tensorflow", "tensorflow-datasets"),
    ],
)
def test_missing_packages_are_named(
    name: str, package: str, install: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module: None if module == package else find(module)
    )
    with pytest.raises(UserError) as error:
        data.open_dataset(name, train=True, mode="RGB", data_dir=str(tmp_path))
    assert f"needs the package {package}: pip install" in str(error.value)
    assert install in str(error.value)


@pytest.mark.parametrize(("train", "flag"), [(True, "--train-split train"), (False, "--val-spl")])
def test_data_that_torchvision_does_not_find(train: bool, flag: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"\({flag}.*use --dataset-download to download"):
        data.open_dataset("torch/cifar10", train=train, mode="RGB", data_dir=str(tmp_path))
    with pytest.raises(UserError, match=rf"\({flag}"):  # in the order of check-data
        data.open_source(
            "torch/cifar10", train=train, mode="RGB", data_dir=str(tmp_path), is_training=False
        )


def test_imagenet_without_the_archives_that_torchvision_wants(tmp_path: Path) -> None:
    """Its images alone, in folders of classes, are read without the name."""
    with pytest.raises(UserError) as error:
        data.open_dataset("torch/imagenet", train=False, mode="RGB", data_dir=str(tmp_path))
    assert "leave --dataset" not in str(error.value)
    folder = tmp_path / "val" / "n01440764"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "a.JPEG")
    with pytest.raises(UserError, match=r"devkit.* leave --dataset torch/imagenet out\.$"):
        data.open_dataset("torch/imagenet", train=False, mode="RGB", data_dir=str(tmp_path))
    assert len(data.open_dataset(None, train=False, mode="RGB", data_dir=str(tmp_path))) == 1


def test_unknown_prefix_and_misplaced_keys(folder: Path) -> None:
    with pytest.raises(UserError, match="unknown data set 'zfs/x': timm knows torch/, wds/"):
        data.open_dataset("zfs/x", train=True, mode="RGB")
    for name, where, key in (
        (None, str(folder), "input_key"),
        ("torch/image_folder", str(folder), "class_map"),
        ("digits", None, "target_key"),
    ):
        flag = f"--{key.replace('_', '-')} means nothing for {name or '--data-dir'}"
        with pytest.raises(UserError, match=flag):
            data.open_dataset(name, train=True, mode="RGB", data_dir=where, **{key: "x"})


def third_of_six(self: StopSignals, device: torch.device, updates: int | None = None) -> int:
    """A signal in the second epoch."""
    return signal.SIGTERM if updates == 9 else 0


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.process)])
def test_a_run_over_shards_resumes_to_the_same_weights(
    workers: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an epoch, and in the middle of one."""
    flags = ["--dataset", "wds/", "--data-dir", str(write_shards(folder, tmp_path / "shards"))]
    flags += [*TINY_FLAGS, "-b", "4", "-j", str(workers), "--epochs", "2", "--no-plot"]
    flags += ["--lr", "1e-2", "--warmup-epochs", "0", "--num-classes", "3"]
    flags += ["--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.5", "--mixup", "0.8"]
    weights = []
    again = ["--resume", "auto"]
    for name, parts in (("whole", [[]]), ("parts", [["--stop-epoch", "1"], again, again])):
        for number, part in enumerate(parts):
            config = run.parse_arguments([*flags, "--output", str(tmp_path / name), *part])
            if number != 1:
                run.train(config)
                continue
            with monkeypatch.context() as patch, pytest.raises(Stopped):
                patch.setattr(StopSignals, "agreed", third_of_six)
                run.train(config)
        weights.append(read_weights(tmp_path / name / "last.safetensors"))
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_shards_resumed_in_the_middle_with_other_batches_and_workers(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A stream's length is an estimate, which depends on both; its number of images does not."""
    flags = ["--dataset", "wds/", "--data-dir", str(write_shards(folder, tmp_path / "shards"))]
    flags += [*TINY_FLAGS, "--output", str(tmp_path / "run"), "--num-classes", "3", "--no-plot"]
    flags += ["--epochs", "1", "--lr", "1e-3", "--warmup-epochs", "0"]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(StopSignals, "agreed", lambda self, device, updates=None: updates == 5 and 15)
        run.train(run.parse_arguments([*flags, "-b", "4", "-j", "0"]))
    capsys.readouterr()
    run.train(run.parse_arguments([*flags, "-b", "16", "-j", "1", "--resume", "auto"]))
    out = capsys.readouterr().out
    assert "after epoch 0 and 1 of 2 batches of the next; changed: batch_size 4 -> 16" in out
    assert "warning: workers and processes share a stream" in out
    assert "with 0 workers in 1 process(es) it would not" in out


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("split", [(), ("--fsdp", "--validation-batch-size", 2)])
def test_two_processes_share_the_shards(
    folder: Path, tmp_path: Path, split: tuple[object, ...]
) -> None:
    """Each held-out image counts once, in whichever process; one has two shards, the other one."""
    root = write_shards(folder, tmp_path / "shards", shards=3)
    flags = ["--dataset", "wds/", "--data-dir", str(root), "--num-classes", "3"]
    more = ["-b", 4, "-j", 1, "--epochs", 1, "--no-plot", "--lr", 1e-3, "--warmup-epochs", 0]
    two_processes(*flags, *TINY_FLAGS, *more, *split, "--output", tmp_path / "run")
    (row,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    checkpoint = ["--checkpoint", str(tmp_path / "run" / "last.safetensors"), "-j", "0"]
    alone = validate.validate(validate.parse_arguments([*checkpoint, *flags]))
    assert alone["images"] == 9
    assert (alone["top1"], alone["loss"]) == pytest.approx((row["eval_top1"], row["eval_loss"]))
