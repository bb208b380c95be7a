"""Teachers: what they are shown, what they add to the loss, and whole runs with them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.task import LogitDistillationTask
from torch import nn
from torch.nn import functional as F

from tests.train.helpers import TINY, train
from vitlinear.checkpoints.card import read_card
from vitlinear.checkpoints.load import load_model
from vitlinear.create import Preprocessing
from vitlinear.errors import UserError
from vitlinear.train.distillation import HardDistillationTask, MesaTask
from vitlinear.train.record.saved_state import read_state
from vitlinear.train.teacher import Teacher

CPU = torch.device("cpu")


def config(mean: float, std: float, size: int = 32) -> Preprocessing:
    return Preprocessing((3, size, size), (mean,) * 3, (std,) * 3, "bicubic", 1.0, "center")


def small(seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_ravlt", num_classes=3, **{**TINY, **kwargs})


def batch(size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 3, size, size, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])


def test_a_teacher_sees_its_own_normalisation() -> None:
    pixels, _ = batch()
    teacher = Teacher(small(), config(0.2, 0.5), config(0.5, 0.25), CPU)
    shown = teacher.normalize_input((pixels - 0.5) / 0.25, None, None)
    torch.testing.assert_close(shown, (pixels - 0.2) / 0.5)
    same = Teacher(small(), config(0.5, 0.25), config(0.5, 0.25), CPU)
    assert same.normalize_input(pixels) is pixels
    assert not any(value.requires_grad for value in teacher.parameters())
    assert not any(module.training for module in teacher.train().modules())


def test_a_teacher_built_for_one_size_gets_it() -> None:
    vit = timm.create_model("test_vit", num_classes=3, img_size=48)
    assert vit.pretrained_cfg["fixed_input_size"]
    teacher = Teacher(vit, config(0, 1, 48), config(0, 1), CPU)
    images, _ = batch()
    expected = F.interpolate(images, (48, 48), mode="bicubic", antialias=True)
    assert torch.equal(teacher.normalize_input(images), expected)
    assert teacher(teacher.normalize_input(images)).shape == (6, 3)
    free = Teacher(small(), config(0, 1, 48), config(0, 1), CPU)
    assert free.normalize_input(images) is images


def test_losses_of_soft_and_hard_distillation() -> None:
    images, labels = batch()
    student, teacher = small(0).eval(), small(1)
    wrapped = Teacher(teacher, config(0, 1), config(0, 1), CPU)
    logits, wanted = student(images), teacher.eval()(images)
    task_loss = F.cross_entropy(logits, labels)
    soft = LogitDistillationTask(
        student,
        wrapped,
        distill_loss_weight=0.7,
        temperature=3.0,
        criterion_kwargs={"smoothing": 0},
    )
    p, q = (wanted / 3).softmax(1), (logits / 3).softmax(1)
    divergence = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(soft(images, labels)["loss"], task_loss + 0.7 * divergence)
    hard = HardDistillationTask(
        student, wrapped, task_loss_weight=0.4, criterion_kwargs={"smoothing": 0}
    )
    decided = F.cross_entropy(logits, wanted.argmax(1))
    torch.testing.assert_close(hard(images, labels)["loss"], 0.4 * task_loss + 0.6 * decided)


def mesa(start: int = 0) -> MesaTask:
    task = MesaTask(
        small(), weight=0.5, temperature=2.0, start_update=start,
        criterion_kwargs={"smoothing": 0}, verbose=False,
    )  # fmt: skip
    task.setup_ema(decay=0.5)
    return task


def test_mesa_against_its_definition() -> None:
    images, labels = batch()
    task = mesa()
    with torch.no_grad():
        for value in task.trainable_module_ema.module.head.parameters():
            value.add_(torch.randn_like(value))
    task.train()  # batch statistics for the student, running ones for the average
    student, average = copy.deepcopy(task.trainable_module), task.trainable_module_ema.module
    statistics = average.stem.conv1.bn.running_mean.clone()
    result = task(images, labels)
    logits, wanted = student(images), average.eval()(images)
    p, q = (wanted / 2).softmax(1), (logits / 2).softmax(1)
    expected = F.cross_entropy(logits, labels) + 0.5 * 4 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(result["loss"], expected)
    assert torch.equal(average.stem.conv1.bn.running_mean, statistics)
    result["loss"].backward()
    assert all(value.grad is None for value in average.parameters())


def test_mesa_starts_late_and_remembers_it() -> None:
    images, labels = batch()
    task = mesa(start=2).eval()
    assert "kd_loss" not in task(images, labels)
    for step in (1, 2):
        task.update_ema(step)
    assert "kd_loss" in task(images, labels)
    fresh = mesa(start=2).eval()
    state = {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}
    assert "task_state_ema" not in state
    fresh.load_checkpoint_state(state["state_dict"], state["task_state"])
    assert "kd_loss" in fresh(images, labels)


@pytest.fixture(scope="module")
def teacher(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model of other images statistics."""
    path = tmp_path_factory.mktemp("teacher")
    flags = ("--epochs", 1, "--mean", 0.3, 0.4, 0.5, "--std", 0.2, 0.2, 0.2)
    train(folder, path / "run", *flags)
    return path / "run" / "best.safetensors"


DEIT = ["--model", "deit_tiny_distilled_patch16_224", "--model-kwargs"]
DEIT += ["embed_dim=32", "depth=1", "num_heads=2", "patch_size=8"]


@pytest.mark.parametrize(
    "flags",
    [
        "--kd-distill-type logit --mixup 0.8 --cutmix 1 --model-ema --amp --amp-dtype bfloat16",
        "--kd-distill-type logit --kd-loss-type hard --task-loss-weight 0.5 --grad-accum-steps 2",
        "--kd-distill-type feature --model-ema --clip-grad 1 --layer-decay 0.8",
        "--kd-distill-type token --kd-token-distill-type hard --channels-last --mixup 0.8",
    ],
)
def test_runs_with_a_teacher(folder: Path, tmp_path: Path, teacher: Path, flags: str) -> None:
    more = [*flags.split(), "--kd-checkpoint", teacher]
    if "token" in flags:
        more += DEIT
    if "feature" in flags:  # another width: a projection is trained along
        more += ["--model-kwargs", "head_width=24", "embed_dims=(8,8,16,16)", "depths=(1,1,1,1)"]
        more += ["num_heads=(1,1,1,1)", "mlp_ratios=(1,1,1,1)"]
    path = tmp_path / "run"
    train(folder, path, *more, "--stop-epoch", 1)
    state = read_state(path / "last_state.pt")
    loaded, _ = load_model(path / "last.safetensors")
    assert state["state_dict"].keys() == loaded.state_dict().keys(), "the student alone"
    assert train(folder, path, *more, "--resume", "auto")["epoch"] == 2


def test_run_with_mesa(folder: Path, tmp_path: Path) -> None:
    """Its second epoch differs from that of a run without; resumed there, it does not."""
    flags = ("--model-ema", "--model-ema-decay", 0.5, "--smoothing", 0)
    for name, more in (("plain", ()), ("a", ("--mesa", 5)), ("b", ("--mesa", 5))):
        start = ("--mesa-start-epoch", 1) if more else ()
        stop = ("--stop-epoch", 1) if name == "b" else ()
        train(folder, tmp_path / name, *flags, *more, *start, *stop)
    train(folder, tmp_path / "b", *flags, "--mesa", 5, *start, "--resume", "auto")
    plain, whole, resumed = (
        read_state(tmp_path / n / "last_state.pt") for n in ("plain", "a", "b")
    )
    key = "head.fc.weight"
    assert not torch.equal(plain["state_dict"][key], whole["state_dict"][key])
    for kind in ("state_dict", "state_dict_ema"):
        assert all(torch.equal(v, resumed[kind][k]) for k, v in whole[kind].items())


def test_what_cannot_be_distilled(folder: Path, tmp_path: Path, teacher: Path) -> None:
    card = read_card(teacher)
    assert card is not None
    bare = tmp_path / "bare.pt"
    torch.save(timm.create_model("test_vit", num_classes=7).state_dict(), bare)
    for flags, message in (
        (["--mesa", 1], "add --model-ema"),
        (["--mesa", 1, "--model-ema", "--kd-checkpoint", teacher], "exclude each other"),
        (["--task-loss-weight", 1], "name one with --kd-model-name"),
        (["--kd-checkpoint", teacher, "--kd-distill-type", "token"], "set_distilled_training"),
        (["--kd-checkpoint", teacher, "--in-chans", 1], "takes 3 channels, the student 1"),
        (["--kd-checkpoint", bare], "does not say which model it is: give --kd-model-name"),
        (
            ["--kd-checkpoint", bare, "--kd-model-name", "test_vit"],
            "the teacher's checkpoint .* does not fit test_vit: .*; give its --kd-model-name, and "
            "weights for the 3 classes",
        ),
        (["--kd-checkpoint", tmp_path / "none.pt"], "none.pt"),
        (["--kd-model-name", "resnet_18"], "unknown model 'resnet_18'"),
    ):
        with pytest.raises(UserError, match=message):
            train(folder, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()
