"""Whole runs: files, equal seeds, resuming, several processes."""

import contextlib
import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.pairwise import some_by_night
from tests.train.helpers import CLASSES, image_folder, tiny_flags, train, two_processes
from vitlinear.checkpoints.card import read_card
from vitlinear.checkpoints.load import read_weights
from vitlinear.errors import UserError
from vitlinear.evaluation.evaluate import evaluate
from vitlinear.signals import Stopped, StopSignals
from vitlinear.train import loop, run
from vitlinear.train.parallel import synchronised
from vitlinear.train.progress import TIMES
from vitlinear.train.record.folder import BAD_IMAGES, FILES, PATCHES
from vitlinear.train.record.saved_state import read_state
from vitlinear.train.updater import Updater

# Everything that draws random numbers or keeps state between updates.
FULL = ["--epochs", 4, "--model-ema", "--model-ema-decay", 0.9, "--drop-path", 0.2]
FULL += ["--mixup", 0.8, "--reprob", 0.5, "--aa", "rand-m9-mstd0.5-inc1"]
FULL += ["--sched-on-updates", "--clip-grad", 1, "--log-interval", 4]


def weights(path: Path, name: str = "last.safetensors") -> dict[str, torch.Tensor]:
    return read_weights(path / name)


def assert_same_bits(first: Any, second: Any) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def assert_same_run(first: Path, second: Path, epochs: int = 4) -> None:
    """Compares everything that two finished runs left, but times."""
    for name in ("last.safetensors", "best.safetensors"):
        assert_same_bits(weights(first, name), weights(second, name))
    whole, resumed = (read_state(path / "last_state.pt") for path in (first, second))
    assert_same_bits(whole["state_dict"], resumed["state_dict"])
    assert_same_bits(whole["state_dict_ema"], resumed["state_dict_ema"])
    assert whole["best"] == resumed["best"] and whole["updates"] == resumed["updates"]
    for key, value in whole["optimizer"]["state"].items():
        assert_same_bits(value, resumed["optimizer"]["state"][key])
    assert [row["epoch"] for row in metrics(first)] == [*range(1, epochs + 1)]
    for name in ("metrics.jsonl", "updates.jsonl"):
        rows = [metrics(path, name) for path in (first, second)]
        assert len(rows[0]) == len(rows[1])
        for one, other in zip(*rows, strict=True):
            assert one.keys() == other.keys()
            for key in one.keys() - TIMES:
                assert one[key] == other[key], (name, key)


@pytest.mark.slow
@pytest.mark.parametrize(
    "workers", [0, pytest.param(2, marks=(pytest.mark.process, pytest.mark.nightly))]
)
def test_same_seed_same_bits_and_resumed_equals_whole(
    folder: Path, tmp_path: Path, workers: int
) -> None:
    flags = (*FULL, "-j", workers)
    train(folder, tmp_path / "a", *flags)
    train(folder, tmp_path / "b", *flags)
    for name in ("last.safetensors", "best.safetensors"):
        assert_same_bits(weights(tmp_path / "a", name), weights(tmp_path / "b", name))

    train(folder, tmp_path / "c", *flags, "--stop-epoch", 2)
    assert read_state(tmp_path / "c" / "last_state.pt")["epoch"] == 2
    torch.rand(11)  # a new process would not be where the old one stopped, either
    result = train(folder, tmp_path / "c", *flags, "--resume", "auto")
    assert result["epoch"] == 4
    assert_same_run(tmp_path / "a", tmp_path / "c")


@pytest.mark.slow
@pytest.mark.parametrize(("update", "workers", "more"), [
    (1, 0, ()), pytest.param(4, 2, (), marks=(pytest.mark.process, pytest.mark.nightly)),
    (3, 0, ("--grad-accum-steps", 2)), (9, 0, ("--recovery-interval", 2)),
])  # fmt: skip
def test_stopped_by_a_signal_and_resumed_equals_whole(
    folder: Path, tmp_path: Path, update: int, workers: int, more: tuple[Any, ...]
) -> None:
    """In the middle of an epoch or at its end: 24 images make 6 batches of 4."""
    flags = (*FULL, "--epochs", 2, "-b", 4, "-j", workers, *more)
    train(folder, tmp_path / "whole", *flags)
    real, calls = Updater._update, 0

    def stop_at(self: Updater) -> None:
        nonlocal calls
        real(self)
        calls += 1
        if calls == update:
            signal.raise_signal(signal.SIGUSR1)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped, match="SIGUSR1") as stop:
        patch.setattr(Updater, "_update", stop_at)
        train(folder, tmp_path / "run", *flags)
    assert stop.value.exit_status == 128 + signal.SIGUSR1
    state = read_state(tmp_path / "run" / "last_state.pt")
    assert state["updates"] == update
    result = train(folder, tmp_path / "run", *flags, "--resume", "auto")
    assert result["epoch"] == 2
    assert_same_run(tmp_path / "whole", tmp_path / "run", epochs=2)


def test_killed_in_the_evaluation_and_resumed_equals_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--model-ema", "--model-ema-decay", 0.5, "--grad-accum-steps", 2, "--drop-path", 0.2)
    flags += ("--epochs", 4)
    train(folder, tmp_path / "whole", *flags)

    def die(model: Any, *args: Any, **kwargs: Any) -> Any:
        if (tmp_path / "run" / "last.safetensors").exists():  # of the first epoch
            raise SystemExit
        return evaluate(model, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("vitlinear.train.epochs.evaluate", die)
        train(folder, tmp_path / "run", *flags)
    state = read_state(tmp_path / "run" / "last_state.pt")
    assert (state["epoch"], state["batch"], state["updates"]) == (1, 3, 4)
    with monkeypatch.context() as patch:
        patch.setattr(Updater, "_update", None)  # nothing is trained again
        train(folder, tmp_path / "run", *flags, "--resume", "auto", "--stop-epoch", 2)
    train(folder, tmp_path / "run", *flags, "--resume", "auto")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_state_of_another_batch_size_goes_on_at_the_same_image(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("-b", 4, "--epochs", 1)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(StopSignals, "agreed", lambda self, device, updates=None: updates == 3 and 15)
        train(folder, tmp_path / "run", *flags)
    seen: list[int] = []
    real = loop.batches_from

    def note(loader: Any, first: int) -> Any:
        for number, batch in real(loader, first):
            seen.append(number)
            yield number, batch

    monkeypatch.setattr(loop, "batches_from", note)
    flags = ("-b", 8, "--epochs", 1, "--resume", "auto")
    train(folder, tmp_path / "run", *flags)
    # 12 images were done; the third batch of 8 holds the last third, the second overlaps
    assert seen == [1, 2]
    assert read_state(tmp_path / "run" / "last_state.pt")["updates"] == 3


@pytest.mark.gpu
def test_a_deterministic_run_on_a_gpu_is_repeated_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    flags = (*FULL, "--device", "cuda", "--deterministic")
    try:
        for name in "ab":
            train(folder, tmp_path / name, *flags)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_another_training_set_is_refused_in_the_middle_of_an_epoch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(StopSignals, "agreed", lambda self, device, updates=None: updates == 1 and 15)
        train(folder, tmp_path / "run", "--epochs", 1)
    more = image_folder(tmp_path / "more", train=9)
    with pytest.raises(UserError, match="has 27 images, the run was started with 24"):
        train(more, tmp_path / "run", "--epochs", 1, "--resume", "auto")


def test_another_training_set_keeps_the_place_in_the_schedule(folder: Path, tmp_path: Path) -> None:
    flags = ("--epochs", 2, "--warmup-epochs", 0, "--min-lr", 0, "--sched-on-updates")
    train(folder, tmp_path / "run", *flags, "--stop-epoch", 1)
    more = image_folder(tmp_path / "more", train=16)
    train(more, tmp_path / "run", *flags, "--resume", "auto")
    first, second = metrics(tmp_path / "run")
    assert second["lr"] == pytest.approx(first["lr"] / 2)  # of the cosine
    assert second["updates"] == 12


def test_another_seed_is_another_run(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path / "a", "--epochs", 1)
    train(folder, tmp_path / "b", "--epochs", 1, "--seed", 43)
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert not torch.equal(first["head.fc.weight"], second["head.fc.weight"])


def test_float16_scaler_survives_resuming(folder: Path, tmp_path: Path) -> None:
    flags = ("--amp", "--amp-dtype", "float16", "--epochs", 3)
    train(folder, tmp_path / "a", *flags)
    train(folder, tmp_path / "b", *flags, "--stop-epoch", 1)
    train(folder, tmp_path / "b", *flags, "--resume", tmp_path / "b" / "last_state.pt")
    assert_same_bits(weights(tmp_path / "a"), weights(tmp_path / "b"))
    states = [read_state(tmp_path / name / "last_state.pt")["scaler"] for name in "ab"]
    assert states[0] == states[1]


def ours(path: Path) -> list[str]:
    """The files of a run; a patch is there whenever this checkout is not what was committed."""
    return sorted(file.name for file in path.glob("*") if not file.match(PATCHES))


def metrics(path: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


def test_files_of_a_run(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    result = train(folder, path, "--model-ema", "--plot", "--experiment", "")
    assert ours(path) == sorted(set(FILES) - {BAD_IMAGES})
    rows = metrics(path)
    with open(path / "summary.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [{k: float(v) for k, v in row.items()} for row in table] == rows
    for name in ("lr", "train_loss", "train_top1", "eval_loss", "eval_top5", "ema_top1", "seconds"):
        assert all(name in row for row in rows)
    assert (path / "curves.png").read_bytes().startswith(b"\x89PNG")
    saved = yaml.safe_load((path / "args.yaml").read_text())
    assert saved["epochs"] == 2 and "rank" not in saved and "resume" not in saved
    best, last = (read_card(path / name) for name in ("best.safetensors", "last.safetensors"))
    assert best is not None and last is not None
    assert best.class_names == list(CLASSES) and best.epoch == result["best"]["epoch"]
    assert best.metric == {"top1": result["best"]["value"]}
    assert best.weights == result["best"]["weights"] and (last.weights, last.epoch) == ("ema", 2)
    best_value = max(max(row["eval_top1"], row["ema_top1"]) for row in rows)
    assert result["best"]["value"] == best_value


def test_saved_arguments_repeat_the_run(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path / "a", "--epochs", 1)
    again = ["--config", str(tmp_path / "a" / "args.yaml"), "--output", str(tmp_path / "b")]
    run.train(run.parse_arguments(again))
    assert_same_bits(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_a_run_is_not_overwritten_unasked(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path / "run", "--epochs", 1)
    before = (tmp_path / "run" / "last_state.pt").read_bytes()
    with pytest.raises(UserError, match="already holds a run .*--resume auto .*--overwrite"):
        train(folder, tmp_path / "run", "--epochs", 1)
    assert (tmp_path / "run" / "last_state.pt").read_bytes() == before
    train(folder, tmp_path / "run", "--epochs", 1, "--overwrite", "--seed", 1)
    assert len(metrics(tmp_path / "run")) == 1


def test_resuming_refuses_another_run(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(folder, path, "--epochs", 2, "--stop-epoch", 1)
    for flags, message in (
        (("--seed", 7), "with seed 7: it was started with 42"),
        (("--eval-metric", "loss"), "with eval_metric loss: it was started with top1"),
        (("--freeze", "stem"), r"with freeze \['stem'\]: it was started with \[\]"),
        (("--model-ema",), "with model_ema True"),
        (("--opt", "sgd"), "with opt sgd.*--config .*args.yaml"),
        (("--weight-decay", 0.2), "with weight_decay 0.2"),
    ):
        with pytest.raises(UserError, match=message):
            train(folder, path, "--resume", "auto", *flags)
    with pytest.raises(UserError, match="none.pt does not exist"):
        train(folder, tmp_path, "--resume", tmp_path / "none.pt")
    with pytest.raises(UserError, match="continues in .*run, not in .*other"):
        train(folder, tmp_path / "other", "--resume", path)
    with pytest.raises(UserError, match="exclude each other"):
        train(folder, path, "--resume", path, "--overwrite")
    again = ["--config", str(path / "args.yaml"), "--resume", str(path), "--stop-epoch", "2"]
    assert run.train(run.parse_arguments(again))["epoch"] == 2


def test_resuming_refuses_other_classes(tmp_path: Path) -> None:
    """As many of them: labels are places in the order of the names."""
    data = image_folder(tmp_path / "images")
    train(data, tmp_path / "run", "--stop-epoch", 1)
    for split in ("train", "val"):
        (data / split / "ant").rename(data / split / "zebra")
    with pytest.raises(UserError, match="the run to resume and the data differ: .* ant, zebra"):
        train(data, tmp_path / "run", "--resume", "auto")


def test_a_state_of_another_size_names_both_models(folder: Path, tmp_path: Path) -> None:
    flags = ("--model", "test_linear_deit", "--model-kwargs", "depth=1")
    train(folder, tmp_path / "run", *flags, "--epochs", 1)
    with pytest.raises(UserError) as error:
        train(folder, tmp_path / "run", *flags, "--img-size", 48, "--resume", "auto")
    assert str(error.value).startswith(
        "cannot resume: the state is of test_linear_deit (--img-size 32), the command makes "
        "test_linear_deit (--img-size 48): pos_embed is (1, "
    )
    assert "\n" not in str(error.value)


def test_a_resumed_run_says_from_where_and_what_has_changed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    result = train(folder, path, "--epochs", 2, "--stop-epoch", 1, "--resume", "auto")
    out = capsys.readouterr().out
    assert "goes on after" not in out
    best = f"ended after epoch 1; best held-out top1 {result['best']['value']:.4g} (epoch 1), in "
    assert best + str(path / "best.safetensors") in out
    train(folder, path, "--epochs", 2, "--resume", path, "--smoothing", 0.2, "-j", 1)
    out = capsys.readouterr().out
    assert (
        "goes on after epoch 1; changed: smoothing 0.1 -> 0.2, stop_epoch 1 -> None, workers 0 -> 1"
        in out
    )
    train(folder, path, "--epochs", 2, "--resume", path, "--smoothing", 0.2, "-j", 1)
    out = capsys.readouterr().out
    assert "goes on after epoch 2\n" in out and "ended after epoch 2; best" in out


def test_no_bound_of_gradients_is_none(folder: Path, tmp_path: Path) -> None:
    """0 takes back what a ``--config`` sets; to bound by it would train nothing."""
    for name, flags in (("a", ()), ("b", ("--clip-grad", 0))):
        train(folder, tmp_path / name, "--epochs", 1, *flags)
    assert_same_bits(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_batch_norms_are_synchronised_between_gpus_only(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--sync-bn works between GPUs only, not on cpu"):
        synchronised(torch.nn.BatchNorm2d(1), torch.device("cpu"))
    converted = synchronised(torch.nn.BatchNorm2d(1), torch.device("cuda"))
    assert isinstance(converted, torch.nn.SyncBatchNorm)
    # with one process there is nothing to synchronise: a recipe that asks for it runs anywhere
    assert train(folder, tmp_path / "new", "--sync-bn", "--epochs", 1)["epoch"] == 1


def test_resume_auto_starts_where_there_is_nothing(folder: Path, tmp_path: Path) -> None:
    assert train(folder, tmp_path / "new", "--resume", "auto", "--epochs", 1)["epoch"] == 1
    # or where a run was killed before its first epoch ended, as a queue restarts it
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "args.yaml").write_text("epochs: 1\n")
    assert train(folder, tmp_path / "killed", "--resume", "auto", "--epochs", 1)["epoch"] == 1


def test_a_run_that_fails_leaves_what_it_has_to_show(folder: Path, tmp_path: Path) -> None:
    """Nothing before its first row; its rows, also of a first epoch, after that."""
    flags = ("--lr", 1e30, "--warmup-epochs", 0, "--max-nonfinite", 0)
    with pytest.raises(UserError, match="first layer with non-finite activations: stem"):
        train(folder, tmp_path / "deep" / "run", *flags)
    assert list(tmp_path.iterdir()) == []

    with pytest.raises(UserError, match="1 of 2 updates of epoch 1 had"):
        train(folder, tmp_path / "run", *flags, "--log-interval", 1)
    assert ours(tmp_path / "run") == ["args.yaml", "environment.json", "updates.jsonl"]
    (row,) = metrics(tmp_path / "run", "updates.jsonl")
    assert row["update"] == 1 and row["train_loss"] > 0
    with pytest.raises(UserError, match="already holds a run .*--resume auto .*--overwrite"):
        train(folder, tmp_path / "run")
    again = ("--resume", "auto", "--log-interval", 1)
    assert train(folder, tmp_path / "run", *again)["epoch"] == 2
    rows = metrics(tmp_path / "run", "updates.jsonl")
    assert [row["update"] for row in rows] == [1, 2, 3, 4, 5, 6]


@pytest.mark.process
def test_two_processes(folder: Path, tmp_path: Path) -> None:
    """One set of files, exact counts over uneven shards."""
    more = ("-b", 4, "--model-ema", "--grad-accum-steps", 2, "--aug-repeats", 2)
    output = two_processes(*tiny_flags(folder, tmp_path / "run", *more))
    rows = metrics(tmp_path / "run")
    assert len(rows) == 2
    for row in rows:  # nine held-out images: five and four per process
        assert (row["eval_top1"] * 9 / 100) == pytest.approx(round(row["eval_top1"] * 9 / 100))
    assert output.count("epoch 1:") == 1


TWO_EPOCHS = ("--epochs", 2, "--eval-metric", "loss")


@pytest.fixture(scope="module")
def two_epochs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two_epochs") / "run"
    train(folder, path, *TWO_EPOCHS)
    return path


@some_by_night("call", range(1, 19), (1, 2, 4, 7, 9, 12, 14, 16, 18))
def test_death_at_any_write_loses_at_most_an_epoch(
    folder: Path, two_epochs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Two epochs make eighteen writes or fewer; dying at each, then resuming, changes no bit."""
    real, calls = os.replace, 0

    def replace(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise SystemExit
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with contextlib.suppress(SystemExit):
            train(folder, tmp_path / "run", *TWO_EPOCHS)
    left = ours(tmp_path / "run")
    assert set(left) <= set(FILES), "temporary files"
    shown = {"last_state.pt", "previous_state.pt", "metrics.jsonl", "updates.jsonl"} & set(left)
    assert (tmp_path / "run").exists() == bool(shown), "a run without rows leaves nothing"
    assert train(folder, tmp_path / "run", *TWO_EPOCHS, "--resume", "auto")["epoch"] == 2
    for name in ("last.safetensors", "best.safetensors"):
        assert_same_bits(weights(two_epochs, name), weights(tmp_path / "run", name))
    assert [row["epoch"] for row in metrics(tmp_path / "run")] == [1, 2]
