"""Updates: accumulation, clipping, schedule, precision."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from torch import distributed, nn

from tests.train.helpers import tiny_flags, train
from vitlinear.checkpoints.load import load_model
from vitlinear.create import build_model
from vitlinear.errors import UserError
from vitlinear.train.loop import train_one_epoch, updates_per_epoch
from vitlinear.train.run import parse_arguments
from vitlinear.train.schedule import learning_rate, set_schedule
from vitlinear.train.updater import Updater


def batches(count: int, size: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, 5, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def updater(net: nn.Module, **kwargs: object) -> Updater:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    task = ClassificationTask(net, verbose=False)
    return Updater(task, optimizer, None, None, **kwargs)  # type: ignore[arg-type]


def epoch(up: Updater, data: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    return train_one_epoch(up, data, contextlib.nullcontext)


def merged(
    data: list[tuple[torch.Tensor, torch.Tensor]], group: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same data in batches that hold a whole group each."""
    return [
        tuple(map(torch.cat, zip(*data[start : start + group], strict=True)))  # type: ignore[misc]
        for start in range(0, len(data), group)
    ]


@pytest.mark.quick
@pytest.mark.parametrize(("count", "group"), [(6, 3), (7, 3), (2, 3), (5, 1)])
def test_accumulation_equals_large_batches_with_the_remainder(count: int, group: int) -> None:
    """The last group of an epoch is smaller; its gradients must be a mean all the same."""
    torch.manual_seed(0)
    net = nn.Linear(5, 3, dtype=torch.float64)
    other = copy.deepcopy(net)
    first = updater(net, accumulate=group)
    second = updater(other)
    metrics = epoch(first, batches(count))
    expected = epoch(second, merged(batches(count), group))
    assert first.updates == second.updates == updates_per_epoch(count, group)
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    if group == 1:
        assert metrics["train_loss"] == expected["train_loss"]


def test_processes_exchange_gradients_once_per_update(process_group: None) -> None:
    up = updater(nn.Linear(5, 3, dtype=torch.float64), accumulate=3)
    up.task.prepare_distributed(device_ids=None)
    exchanges = 0

    def count(state: None, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        nonlocal exchanges
        exchanges += 1
        done: torch.futures.Future = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    up.task.get_trainable_module().register_comm_hook(None, count)  # type: ignore[union-attr]
    epoch(up, batches(8))
    assert exchanges == up.updates == 3


@pytest.mark.quick
def test_loss_and_top1_are_means_over_images() -> None:
    torch.manual_seed(0)
    net = nn.Linear(5, 3, dtype=torch.float64)
    data = batches(3) + batches(1, size=2)
    up = updater(net)
    up.optimizer.param_groups[0]["lr"] = 0.0
    metrics = epoch(up, data)
    images, labels = map(torch.cat, zip(*data, strict=True))
    logits = net(images)
    loss = nn.functional.cross_entropy(logits, labels).item()
    assert metrics["train_loss"] == pytest.approx(loss, rel=1e-12)
    top1 = 100 * (logits.argmax(1) == labels).double().mean().item()
    assert metrics["train_top1"] == pytest.approx(top1)


def test_clipping_bounds_the_update() -> None:
    torch.manual_seed(0)
    net = nn.Linear(5, 3, dtype=torch.float64)
    before = [parameter.clone() for parameter in net.parameters()]
    epoch(updater(net, clip_grad=1e-3), batches(1))
    pairs = zip(before, net.parameters(), strict=True)
    step = torch.cat([(old - new).flatten() for old, new in pairs])
    assert step.norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)


class Normed(nn.Module):
    """A linear classifier between layers that keep statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(x))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_leaves_no_trace(bad: float, accumulate: int) -> None:
    torch.manual_seed(0)
    net = Normed()
    other = copy.deepcopy(net)
    clean = batches(6)
    spoilt = [(images.clone(), labels) for images, labels in clean]
    spoilt[3][0][1, 2] = bad
    first = updater(net, accumulate=accumulate, ema=True)
    first.task.setup_ema(decay=0.5)
    metrics = epoch(first, spoilt)
    left_out = 3 - 3 % accumulate
    kept = clean[:left_out] + clean[left_out + accumulate :]
    second = updater(other, accumulate=accumulate, ema=True)
    second.task.setup_ema(decay=0.5)
    expected = epoch(second, kept)
    assert metrics["train_skipped"] == first.skipped == 1 and expected["train_skipped"] == 0
    assert first.updates == second.updates + 1
    for ema in (False, True):
        ours, theirs = (up.task.get_trainable_module(ema=ema) for up in (first, second))
        assert ours is not None and theirs is not None
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name
    if accumulate == 1:
        assert all(metrics[name] == expected[name] for name in ("train_loss", "train_top1"))


class Wrapped(nn.Module):
    """Shows the attributes of the module inside, as adapters do."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inside"), name)

    def forward(self, *args: Any) -> Any:
        return self.inside(*args)


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_update_that_is_not_finite_moves_no_centroids(wrapped: bool) -> None:
    """Nor any other buffer that a module names in ``moves_in_training``."""
    torch.manual_seed(0)
    net = build_model("test_linear_deit", num_classes=3, attention="routing").train()
    if wrapped:
        for module in [m for m in net.modules() if hasattr(m, "mixer")]:
            module.mixer = Wrapped(module.mixer)
    up = updater(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    images = torch.randn(2, *net.default_cfg["input_size"])
    for factor, moves in ((float("nan"), False), (1.0, True)):
        up.backward(net(images).sum() * factor, group=1, last=True)
        moved = {n for n, value in net.state_dict().items() if not torch.equal(value, before[n])}
        assert any("centroids" in name for name in moved) == bool(moved) == moves


def test_gradients_that_overflow_are_skipped_too() -> None:
    """sqrt(0) has a finite loss and an infinite derivative."""

    class Root(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).sub(super().forward(x)).sqrt()

    net = Root(5, 3, dtype=torch.float64)
    before = net.weight.detach().clone()
    with pytest.raises(UserError, match="1 of 1 .*largest logit is 0.*gradients overflow"):
        epoch(updater(net), batches(1))
    assert torch.equal(net.weight, before)


def test_a_scale_that_falls_for_ever_is_counted() -> None:
    """sqrt(0) again, under a float16 scaler, which could only go on halving the loss."""

    class Root(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).sub(super().forward(x)).sqrt()

    up = updater(Root(5, 3, dtype=torch.float64))
    up.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with pytest.raises(UserError, match="3 of 5 .*gradients overflow.* bfloat16"):
        train_one_epoch(up, batches(9), contextlib.nullcontext, max_nonfinite=2)


def test_too_many_skipped_updates_stop_the_run_with_a_diagnosis() -> None:
    class Log(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.log()

    net = nn.Sequential(nn.Linear(5, 5), Log(), nn.Linear(5, 3)).double()
    data = batches(4)
    with pytest.raises(UserError) as caught:
        train_one_epoch(updater(net), data, contextlib.nullcontext, max_nonfinite=2)
    text = str(caught.value)
    assert "3 of 3 updates of epoch 1" in text
    assert "first layer with non-finite activations: 1 (Log)" in text
    assert "in: [4, 5] float64, 0 NaN, 0 infinite, finite ones from -" in text
    assert "NaN, 0 infinite" in text and "Lower --lr, add --clip-grad" in text
    assert "bfloat16" not in text

    net = nn.Sequential(nn.Linear(5, 3)).double()
    data[0][0][0, 0] = float("nan")
    with pytest.raises(UserError, match="images themselves are not finite: .* 1 NaN.* check the"):
        train_one_epoch(updater(net), data, contextlib.nullcontext, max_nonfinite=0)
    with torch.no_grad():
        net[0].weight[1, 1] = float("inf")
    with pytest.raises(UserError, match="weights are not finite before .*; first 0.weight"):
        train_one_epoch(updater(net), data[1:], contextlib.nullcontext, max_nonfinite=0)


@pytest.mark.quick
@pytest.mark.parametrize("on_updates", [False, True])
def test_learning_rates_of_a_run_and_of_a_resumed_one(on_updates: bool) -> None:
    """Warm-up starts at its own rate (not at the peak), and a later start joins the same curve."""

    def rates(first: int) -> list[float]:
        net = nn.Linear(5, 3, dtype=torch.float64)
        up = updater(net, updates=3 * first)
        up.scheduler, _ = create_scheduler_v2(
            up.optimizer, "cosine", num_epochs=6, warmup_epochs=2, warmup_lr=1e-3, min_lr=1e-2,
            step_on_epochs=not on_updates, updates_per_epoch=3,
        )  # fmt: skip
        assert up.scheduler is not None
        set_schedule(up.scheduler, first, 3 * first)
        found = []
        for number in range(first, 6):
            for batch in batches(3):
                found.append(up.optimizer.param_groups[0]["lr"])
                loss = up.task(*batch)["loss"]
                up.backward(loss, 1, True)
            up.scheduler.step(number + 1)
        return found

    whole = rates(0)
    assert whole[0] == pytest.approx(1e-3) and max(whole) < 0.1
    assert whole[6:] == sorted(whole[6:], reverse=True)
    assert len(set(whole)) == (18 if on_updates else 6)
    assert rates(4) == pytest.approx(whole[12:])


def test_learning_rate_scales_with_the_global_batch() -> None:
    def rate(*flags: str, world_size: int) -> float:
        config = parse_arguments(flags)
        accumulate = config.optimiser.grad_accum_steps
        images = config.schedule.images_per_update(accumulate, world_size)
        return learning_rate(config.schedule, images)

    assert rate("-b", "64", "--grad-accum-steps", "2", world_size=8) == pytest.approx(1e-3)
    assert rate("-b", "128", "--lr-base-scale", "sqrt", world_size=1) == pytest.approx(2.5e-4)
    assert rate("--lr", "0.3", world_size=8) == 0.3


@pytest.mark.parametrize(
    "flags",
    [
        "--amp --amp-dtype bfloat16 --channels-last",
        "--amp --amp-dtype float16 --clip-grad 1",
        "--grad-checkpointing --grad-accum-steps 2 --clip-grad 0.01 --clip-mode agc",
        pytest.param(
            "--torchcompile eager --model-ema --model-kwargs depths=(1,0,0,0)",
            marks=[pytest.mark.compile, pytest.mark.slow],
        ),
        "--sched-on-updates --drop-path 0.2 --drop 0.1 --aa rand-m9-mstd0.5-inc1",
        "--mixup 0.8 --cutmix 1 --reprob 0.25 --mixup-off-epoch 1",
        "--deterministic --no-aug --layer-decay 0.8 --opt-betas 0.9 0.99 --opt-kwargs eps=1e-7",
    ],
)
def test_every_switch_trains(folder: Path, tmp_path: Path, flags: str) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    try:
        result = train(folder, tmp_path / "run", *flags.split())
    finally:
        torch.use_deterministic_algorithms(before)
    assert result["epoch"] == 2 and 0 <= result["best"]["value"] <= 100
    load_model(result["folder"] / "best.safetensors")  # no wrapper's prefix in the names


@pytest.mark.parametrize("more", [(), ("--grad-accum-steps", 2), ("--model", "test_mavit")])
def test_a_norm_that_sees_one_value_is_one_line(command, folder, tmp_path, more):
    """One image, of which the last map has one place."""
    flags = tiny_flags(folder, tmp_path / "run", "-b", 1, *more)
    result = command("train", *flags)
    assert result.code == 2 and result.err.count("\n") == 1
    assert "1 image(s) of 32 x 32 leave it one value of each channel: give --batch" in result.err
    assert not list(tmp_path.iterdir())
