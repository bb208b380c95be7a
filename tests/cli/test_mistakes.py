"""Each mistake of a user: one line that names the thing and the remedy, status 2, nothing left."""

import builtins
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Command
from tests.train.helpers import TINY_FLAGS, image_folder, tiny_flags
from vitlinear.data.dataset import open_dataset
from vitlinear.errors import pip_install
from vitlinear.train.run import parse_arguments


@pytest.fixture
def refused(command: Command, tmp_path: Path) -> Iterator[Any]:
    """Runs a command that must fail with a message holding the given parts."""

    def run(*args: object, says: tuple[str, ...]) -> None:
        before = sorted(tmp_path.rglob("*"))
        code, out, err = command(*args)
        assert code == 2, (out, err)
        assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
        assert "Traceback" not in err
        for part in says:
            assert part in err
        assert sorted(tmp_path.rglob("*")) == before, "files were left behind"

    yield run


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "ravlt_x"], ["unknown model 'ravlt_x'", "did you mean ravlt_"]),
        (["--model", "ravlt_t.in22k"], ["ravlt_t.in22k"]),
        (["--model", ""], ["no model: give --model NAME"]),
        (["--model-kwargs", "depthss=[1]"], ["cannot build test_ravlt", "depthss"]),
        (["--model-kwargs", "num_classes=3"], ["give num_classes as --num-classes"]),
        (["--epoch", "3"], ["unknown option --epoch", "--epochs"]),
        (["--in-chans", "5"], ["5 channels", "--in-chans 1 or 3"]),
        (["--in-chans", "1", "--input-size", "3", "32", "32"], ["channel"]),
        (["--mean", "0.5", "0.5"], ["mean must have one value or 3"]),
        (["--num-classes", "7"], ["--num-classes 7", "has 3 classes", "leave it out"]),
        (["--device", "warp"], ["--device warp cannot be used here"]),
        (["--device", "cuda:99"], ["--device cuda:99 cannot be used here"]),
        (["--opt", "adamx"], ["--opt adamx"]),
        (["--sched", "cosin", "--min-lr", "0"], ["--sched", "'cosin' (did you mean cosine?)"]),
        (["--sched", "plateau"], ["plateau", "use cosine"]),
        (["-b", "64"], ["24 images, fewer than one batch of 64", "lower --batch-size"]),
        (["--initial-checkpoint", "none.safetensors"], ["none.safetensors does not exist"]),
        (["--resume", "none.pt"], ["none.pt does not exist"]),
        (["--data-dir", "/nowhere"], ["/nowhere does not exist"]),
        (["--dataset", "torch/nothing"], ["torch/nothing"]),
        (["--dataset", "fashion_mnist"], ["Fashion-MNIST not found", "apt install"]),
        (["--dataset", "imagenet"], ["unknown data set 'imagenet'", "digits"]),
        (["--config", "none.yaml"], ["none.yaml"]),
        (["--pretrained", "--model", "test_ravlt"], ["test_ravlt"]),
    ],
)
def test_train(
    refused: Any, images: Path, tmp_path: Path, flags: list[str], says: list[str]
) -> None:
    base = tiny_flags(images, tmp_path / "new" / "run")
    if flags[0] == "--model-kwargs":
        base = [*base[: base.index("--model-kwargs")], *base[base.index("-j") :]]
    refused("train", *base, *flags, says=tuple(says))


def test_train_without_data(refused: Any) -> None:
    refused("train", *TINY_FLAGS, says=("no data: give --dataset NAME or --data-dir FOLDER",))


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_image(refused: Any, tmp_path: Path, workers: int) -> None:
    """Found only when it is read, by a data worker perhaps: still one line, and no run folder."""
    root = image_folder(tmp_path / "images")
    path = root / "train" / "bee" / "3.png"
    path.write_bytes(path.read_bytes()[:-500])
    flags = tiny_flags(root, tmp_path / "new" / "run", "-j", workers)
    refused("train", *flags, says=("cannot read image", "bee/3.png", "replace or remove it"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_class_folder(refused: Any, tmp_path: Path, split: str) -> None:
    """Each message names the flag by which the images that are there can be used."""
    root = image_folder(tmp_path / "images")
    empty = root / split / "cat"
    for file in empty.iterdir():
        file.unlink()
    flags = tiny_flags(root, tmp_path / "run")
    refused("train", *flags, says=(f"{split}/cat holds no images", "--class-map"))
    empty.rmdir()
    refused("train", *flags, says=(" classes, the held-out split ", "cat", "--class-map"))
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\n")
    for _ in range(2):
        sets = [
            open_dataset(None, train=train, mode="L", data_dir=str(root), class_map=str(names))
            for train in (True, False)
        ]
        assert [len(found.classes) for found in sets] == [3, 3]
        assert min(map(len, sets)) == {"train": 9, "val": 6}[split]
        empty.mkdir(exist_ok=True)


def test_splits_of_different_classes(refused: Any, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    (root / "val" / "cat").rename(root / "val" / "cow")
    refused("train", *tiny_flags(root, tmp_path / "run"), says=("differ", "cat, cow"))


def test_no_training_folder(refused: Any, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    (root / "val").rename(root / "test")
    refused("train", *tiny_flags(root, tmp_path / "run"), says=("no 'validation' folder",))


def test_output_that_cannot_be_written(refused: Any, images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    flags = tiny_flags(images, tmp_path / "file" / "run")
    refused("train", *flags, says=("file/run is not writable", "choose another --output"))


@pytest.mark.parametrize("package", ["matplotlib", "sklearn"])
def test_missing_optional_package(
    refused: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    real_find, real_import = importlib.util.find_spec, builtins.__import__

    def find(name: str, *args: Any) -> Any:
        return None if name == package else real_find(name, *args)

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name, name=package)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr(builtins, "__import__", refuse)
    flags = tiny_flags(images, tmp_path / "run", "--dataset", "digits", "--plot")
    refused("train", *flags, says=(pip_install("train"),))


@pytest.mark.skipif(importlib.util.find_spec("webdataset") is not None, reason="it is installed")
def test_missing_reader_package(refused: Any, images: Path, tmp_path: Path) -> None:
    flags = tiny_flags(images, tmp_path / "run", "--dataset", "wds/x")
    refused("train", *flags, says=("wds/x", "install webdataset"))


def test_validate(refused: Any, images: Path, checkpoint: Path, tmp_path: Path) -> None:
    base = ("validate", "-j", 0)
    with_data = (*base, "--data-dir", images)
    refused(*base, says=("no weights", "--checkpoint FILE"))
    refused(*with_data, "--model", "test_vit2", says=("no weights", "--model NAME --pretrained"))
    refused(*base, "--checkpoint", checkpoint, says=("no data",))
    refused(*with_data, "--checkpoint", tmp_path, says=("is a folder",))
    both = (*with_data, "--checkpoint", checkpoint)
    refused(*both, "--model", "ravlt_t", says=("is of test_ravlt, not ravlt_t",))
    refused(*both, "--in-chans", 1, says=("--in-chans 3, not 1",))
    refused(*both, "--num-classes", 4, says=("--num-classes 3, not 4",))
    refused(*both, "--model-kwargs", "depths=[1]", says=("leave --model-kwargs out",))
    refused(*both, "--pretrained", says=("exclude each other",))
    refused(
        *base, "--checkpoint", checkpoint, "--dataset", "digits",
        says=("3 classes, the data 10", "--class-map"),
    )  # fmt: skip
    renamed = image_folder(tmp_path / "renamed")
    (renamed / "val" / "ant").rename(renamed / "val" / "dog")
    refused(
        *base, "--checkpoint", checkpoint, "--data-dir", renamed,
        says=("the checkpoint and the data set differ", "ant, dog"),
    )  # fmt: skip
    results = tmp_path / "no" / "results.json"
    refused(
        *both,
        "--results-file",
        results,
        says=("cannot write", "results.json: its folder does not exist"),
    )


def test_published_weights_of_another_number_of_classes(
    refused: Any, images: Path, checkpoint: Path, tmp_path: Path, command: Command
) -> None:
    assert command("push", checkpoint, tmp_path / "hub").code == 0
    hub = ("--model", f"local-dir:{tmp_path / 'hub'}", "--pretrained", "--num-classes", 10)
    says = ("have 3 classes, not 10", "leave --num-classes out")
    refused("predict", images / "val", *hub, says=says)
    refused("validate", "-j", 0, "--data-dir", images, *hub, says=says)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--amp-dtype", "bfloat16"], "--amp-dtype has no effect without --amp: add that"),
        (["--torchcompile-mode", "default"], "without --torchcompile"),
        (["--model-ema-decay", "0.9"], "without --model-ema"),
        (["--mesa-start-epoch", "1"], "without --mesa"),
        (["--clip-mode", "agc", "--clip-grad", "0"], "without --clip-grad"),
        (["--wandb-project", "x"], "without --log-wandb"),
        (["--kd-loss-type", "hard"], "without --kd-model-name or --kd-checkpoint"),
        (
            ["--kd-loss-type", "hard", "--kd-model-name", "x", "--kd-distill-type", "feature"],
            "--kd-loss-type has no effect without --kd-distill-type logit",
        ),
        (
            ["--kd-token-distill-type", "hard", "--kd-model-name", "x"],
            "without --kd-distill-type token",
        ),
        (["--mixup-prob", "0.5"], "--mixup-prob has no effect without --mixup or --cutmix"),
        (["--mixup-off-epoch", "1"], "without --mixup or --cutmix"),
        (["--mixup-switch-prob", "0.1", "--mixup", "1"], "without --cutmix"),
        (["--remode", "const"], "--remode has no effect without --reprob"),
        (["--warmup-lr", "0", "--warmup-epochs", "0"], "without --warmup-epochs"),
        (["--decay-epochs", "3"], "--decay-epochs has no effect without --sched step, wsd, rsqrt"),
        (["--decay-milestones", "3", "--sched", "step"], "without --sched multistep"),
        (["--min-lr", "0", "--sched", "step"], "--min-lr has no effect without --sched cosine"),
        (["--decay-rate", "0.5", "--sched", "wsd"], "without --sched step, multistep, poly"),
        (["--pretrained", "--initial-checkpoint", "x.pth"], "both give the start weights: leave"),
        (["--dataset-download"], "--dataset-download means nothing for --data-dir"),
    ],
)
def test_flags_that_nothing_heeds(
    refused: Any, images: Path, tmp_path: Path, flags: list[str], says: str
) -> None:
    refused("train", *tiny_flags(images, tmp_path / "new" / "run"), *flags, says=(says,))


def test_a_recipe_holds_values_of_what_the_command_line_switches_off(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("amp: true\namp_dtype: bfloat16\nmodel_ema_decay: 0.9\n")
    assert parse_arguments(["--config", str(config), "--no-amp"]).device.amp_dtype == "bfloat16"


@pytest.mark.parametrize("flag", ["--num-classes", "--crop-pct", "--interpolation"])
def test_flags_that_streaming_does_not_heed(refused: Any, tmp_path: Path, flag: str) -> None:
    stream = ("stream", "test_ravlt", "x.npy", "-o", tmp_path / "y.npy", "--pretrained")
    refused(*stream, flag, 1, says=(f"{flag} means nothing here",))


def test_predict(refused: Any, images: Path, checkpoint: Path, tmp_path: Path) -> None:
    image = images / "val" / "ant" / "0.png"
    base = ("predict", "--checkpoint", checkpoint)
    refused("predict", says=("IMAGE",))
    refused("predict", image, says=("no weights", "--checkpoint FILE"))
    refused(*base, tmp_path / "none.png", says=("none.png does not exist",))
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(*base, empty, says=("empty holds no images", ".png"))
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(image.read_bytes()[:900])
    refused(*base, image, damaged, says=("cannot read image", "damaged.png"))
    text = tmp_path / "text.png"
    text.write_text("hello")
    refused(*base, text, says=("text.png: not an image",))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(checkpoint.read_bytes()[:-7])
    refused("predict", "--checkpoint", broken, image, says=("broken.safetensors is truncated",))
    state = checkpoint.with_name("last_state.pt")
    refused("predict", "--checkpoint", state, image, says=("training state", "best.safetensors"))
    refused(*base, image, "--topk", 0, says=("must be at least 1",))
