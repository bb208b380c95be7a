"""Learning rates, weight decay and averaging: flags against numbers worked out by hand."""

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.pairwise import pairwise
from tests.train.helpers import tiny_flags
from vitlinear.errors import Notice, UserError
from vitlinear.train import epochs as epochs_of_a_run
from vitlinear.train import run
from vitlinear.train.average import ema_decay
from vitlinear.train.config import TrainConfig
from vitlinear.train.optimiser import make_optimizer, undecayed_names
from vitlinear.train.schedule import (
    batch_size_note,
    make_schedule,
    set_schedule,
    shape_notes,
    warmup_and_min_rate,
)
from vitlinear.train.setup import set_up

# Four epochs of two updates, two of them warm-up, then one of cool-down; in units of the peak the
# first rate is 0.1 and the last 0.2. The cosine runs from the start of training: half of it is over
# when the warm-up ends.
SCHEDULE = ["--epochs", 4, "--warmup-epochs", 2, "--cooldown-epochs", 1, "-b", 12]
BY_EPOCH = [0.1, 0.55, 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5)), 0.2]
BY_UPDATE = [
    *(0.1, 0.325, 0.55, 0.775),
    *(0.2 + 0.4 * (1 + math.cos(math.pi * update / 8)) for update in (4, 5, 6, 7)),
    *(0.2, 0.2),
]
RATES = {
    "absolute": ["--lr", 1e-3, "--warmup-lr", 1e-4, "--min-lr", 2e-4],
    # for 6 images, where the run's batch has 12
    "scaled": ["--lr-base", 5e-4, "--lr-base-size", 6, "--lr-base-all"]
    + ["--warmup-lr", 5e-5, "--min-lr", 1e-4],
    "peak-scaled": ["--lr-base", 5e-4, "--lr-base-size", 6, "--warmup-lr", 1e-4, "--min-lr", 2e-4],
}


def configured(*flags: Any) -> TrainConfig:
    return run.parse_arguments([str(flag) for flag in flags])


def tiny_run(data: Path, output: Path, *flags: Any) -> TrainConfig:
    """A tiny run, without its learning rate."""
    tiny = tiny_flags(data, output)
    del tiny[tiny.index("--lr") : tiny.index("--lr") + 2]
    return configured(*tiny, *flags)


def images_of(config: TrainConfig, world_size: int) -> int:
    return config.schedule.images_per_update(config.optimiser.grad_accum_steps, world_size)


@pytest.fixture
def rates() -> Iterator[list[float]]:
    """Learning rates that optimisers use while the test runs, one for each update."""
    found: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        found.append(rate)

    handle = register_optimizer_step_pre_hook(note)
    yield found
    handle.remove()


@pairwise(every=2, given=RATES, by=["epoch", "update"])
def test_every_update_of_a_run_uses_the_rate_worked_out_by_hand(
    folder: Path, tmp_path: Path, rates: list[float], given: str, by: str
) -> None:
    """The first one too: it must not see the peak."""
    stepping = ["--sched-on-updates"] if by == "update" else []
    config = tiny_run(folder, tmp_path / "run", *SCHEDULE, *RATES[given], *stepping)
    assert run.train(config)["epoch"] == 5
    expected = BY_UPDATE if by == "update" else [rate for rate in BY_EPOCH for _ in range(2)]
    assert rates == pytest.approx([1e-3 * rate for rate in expected], rel=1e-9)


def test_without_warm_up_the_first_update_uses_the_peak(
    folder: Path, tmp_path: Path, rates: list[float]
) -> None:
    flags = ["--lr", 1e-3, "--warmup-epochs", 0, "--epochs", 2, "-b", 12, "--min-lr", 0]
    run.train(tiny_run(folder, tmp_path / "run", *flags))
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4])


def test_accumulation_makes_fewer_updates_along_the_same_curve(
    folder: Path, tmp_path: Path, rates: list[float]
) -> None:
    """Three batches of eight in groups of two: two updates in an epoch, the second smaller."""
    flags = [*SCHEDULE[:-2], *RATES["absolute"], "--grad-accum-steps", 2, "--sched-on-updates"]
    run.train(tiny_run(folder, tmp_path / "run", *flags))
    assert rates == pytest.approx([1e-3 * rate for rate in BY_UPDATE], rel=1e-9)


def test_first_and_last_rate_scale_only_when_asked() -> None:
    def rates(*more: Any, world_size: int) -> tuple[float, float]:
        flags = ["-b", 64, "--grad-accum-steps", 2, "--warmup-lr", 1e-6, "--min-lr", 1e-5]
        config = configured(*flags, *more)
        return warmup_and_min_rate(config.schedule, images_of(config, world_size))

    assert rates(world_size=8) == (1e-6, 1e-5)
    assert rates("--lr-base-all", world_size=8) == pytest.approx((2e-6, 2e-5))
    root = rates("--lr-base-all", "--lr-base-scale", "sqrt", world_size=16)
    assert root == pytest.approx((2e-6, 2e-5))


def test_decay_of_the_average_follows_the_global_batch(folder: Path, tmp_path: Path) -> None:
    """Per image the average forgets at one speed: two updates of n images are one of 2n."""
    flags = ["--model-ema", "--model-ema-decay", 0.99, "--model-ema-base-size", 32]
    average = configured(*flags).average
    assert ema_decay(average, 32) == pytest.approx(0.99)
    assert ema_decay(average, 128) == pytest.approx(0.99**4)
    assert ema_decay(average, 16) ** 2 == pytest.approx(0.99)
    assert ema_decay(configured(*flags[:3]).average, 128) == 0.99
    config = tiny_run(folder, tmp_path / "run", "--lr", 1e-3, *flags)
    ema = set_up(config).task.trainable_module_ema
    assert ema.decay == pytest.approx(0.99**0.25)  # batches of 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-b", 128], None),
        (["-b", 64, "--grad-accum-steps", 2], None),
        (
            ["-b", 32],
            "global batch 256 (--batch-size 32 x --grad-accum-steps 1 x 8 process(es)), the "
            "recipe's is 1024: peak learning rate 0.00025 "
            "(linear scaling of 0.0005 per 512 images)",
        ),
        (
            ["-b", 32, "--lr", 4e-3],
            "global batch 256 (--batch-size 32 x --grad-accum-steps 1 x 8 process(es)), the "
            "recipe's is 1024: peak learning rate 0.004 (as it is, --lr; scale it yourself)",
        ),
        (
            ["-b", 1, "--min-lr", 1e-5],
            "global batch 8 (--batch-size 1 x --grad-accum-steps 1 x 8 process(es)), the "
            "recipe's is 1024: peak learning rate 7.8125e-06 (linear scaling of 0.0005 per 512 "
            "images)",
        ),
    ],
)
def test_another_global_batch_than_the_recipes_is_said(
    flags: list[Any], message: str | None
) -> None:
    for recipe, expected in ((["--recipe-batch-size", 1024], message), ([], None)):
        config = configured(*flags, *recipe)
        accumulate = config.optimiser.grad_accum_steps
        assert batch_size_note(config.schedule, accumulate, 8) == expected


@pytest.mark.parametrize(
    ("flags", "notes"),
    [
        ([], []),
        (["-b", 4], ["the last learning rate 1e-05 is above the peak 3.90625e-06: lower --min-lr"]),
        (["-b", 4, "--sched", "constant"], []),
        (
            ["--lr", 1e-4, "--warmup-lr", 1e-3],
            ["the first learning rate 0.001 is above the peak 0.0001: lower --warmup-lr"],
        ),
        (
            ["--epochs", 5],
            [
                "--warmup-epochs 5 of --epochs 5 do not reach the peak learning rate 0.000125: "
                "lower --warmup-epochs, or give --warmup-prefix"
            ],
        ),
        (["--epochs", 5, "--warmup-prefix"], []),
        (
            ["--sched", "step", "--epochs", 30],
            ["--sched step makes no step in --epochs 30: lower --decay-epochs"],
        ),
        (["--sched", "step", "--epochs", 30, "--decay-epochs", 10], []),
        (
            ["--sched", "multistep", "--epochs", 30],
            ["--sched multistep makes no step in --epochs 30: lower --decay-milestones"],
        ),
    ],
)
def test_a_rate_of_another_shape_than_asked_for_is_said(flags: list[Any], notes: list[str]) -> None:
    config = configured(*flags)
    assert shape_notes(config.schedule, images_of(config, 1)) == notes


@pytest.mark.parametrize(
    ("name", "late"), [("poly", 0.5), ("wsd", 1.0), ("step", 1.0), ("multistep", 1.0)]
)
def test_each_schedule_decays_by_its_own_default(name: str, late: float) -> None:
    """Half-way through thirty epochs: a line from the peak down, or still at the peak."""
    flags = ["--sched", name, "--epochs", 30, "--warmup-epochs", 0, "--lr", 1]
    flags += ["--min-lr", 0] if name in ("poly", "wsd") else []
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler, _ = make_schedule(configured(*flags).schedule, optimizer, updates=1, images=128)
    assert scheduler is not None
    set_schedule(scheduler, 15, 15)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(late)
    set_schedule(scheduler, 29, 29)
    last = optimizer.param_groups[0]["lr"]
    assert last < 0.2 if name in ("poly", "wsd") else last == 1.0


@pytest.mark.parametrize(("setting", "values"), [("betas", [0.9, 0.99]), ("eps", [1e-6])])
def test_settings_that_an_optimiser_does_not_have_are_said(
    setting: str, values: list[float]
) -> None:
    model, flags = torch.nn.Linear(2, 2), [f"--opt-{setting}", *values]
    for name in ("sgd", "lookahead_sgd"):
        config = configured("--opt", name, *flags).optimiser
        message = f"--opt {name} has no {setting}: --opt-{setting} is not used"
        with pytest.warns(Notice, match=message):
            make_optimizer(config, model, 1e-3)
    make_optimizer(configured(*flags).optimiser, model, 1e-3)


def test_betas_that_are_too_few_are_said() -> None:
    config = configured("--opt-betas", 0.9).optimiser
    with pytest.raises(UserError, match="--opt adamw takes more --opt-betas than given"):
        make_optimizer(config, torch.nn.Linear(2, 2), 1e-3)


class Scaled(nn.Module):
    """One parameter of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(3))
        self.temperature = nn.Parameter(torch.ones(2))
        self.pos_embed = nn.Parameter(torch.ones(1, 4, 3))
        self.norm = nn.LayerNorm(3)
        self.fc = nn.Linear(3, 2)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": "^pos|^gamma|^temp", "blocks": [(r"^norm", (1,)), (r"^fc", (2,))]}


SPARED = {"gamma", "temperature", "pos_embed", "norm.weight", "norm.bias", "fc.bias"}


def test_weight_decay_of_chosen_parameters_of_one_axis() -> None:
    model = Scaled()
    assert undecayed_names(model, []) == SPARED
    assert undecayed_names(model, ["gam*", "temperature"]) == SPARED - {"gamma", "temperature"}
    assert undecayed_names(model, ["*.bias"]) == SPARED - {"norm.bias", "fc.bias"}
    for pattern in ("fc.weight", "gama"):  # two axes; no such name
        with pytest.raises(UserError, match=f"--weight-decay-1d {pattern} fits no parameter of"):
            undecayed_names(model, [pattern])


@pytest.mark.quick
@pytest.mark.parametrize("layer_decay", [[], ["--layer-decay", 0.5]], ids=["plain", "layers"])
@pytest.mark.parametrize("pattern", [[], ["--weight-decay-1d", "gamma"]], ids=["timm", "gamma"])
def test_groups_of_the_optimiser(layer_decay: list[Any], pattern: list[str]) -> None:
    config = configured("--weight-decay", 0.1, *layer_decay, *pattern).optimiser
    model = Scaled()
    optimizer = make_optimizer(config, model, lr=1e-3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    spared, scales = set(), {}
    for group in optimizer.param_groups:
        assert group["weight_decay"] in (0.0, 0.1)
        for parameter in group["params"]:
            spared |= {names[id(parameter)]} if group["weight_decay"] == 0 else set()
            scales[names[id(parameter)]] = group.get("lr_scale", 1.0)
    assert spared == (SPARED - {"gamma"} if pattern else SPARED)
    assert scales.keys() == set(names.values())
    if layer_decay:
        assert (scales["gamma"], scales["norm.weight"], scales["fc.weight"]) == (0.25, 0.5, 1.0)
    else:
        assert set(scales.values()) == {1.0}


@pytest.mark.parametrize("by", [[], ["--sched-on-updates"]], ids=["epoch", "update"])
@pytest.mark.parametrize(
    "name", ["cosine", "tanh", "step", "multistep", "poly", "constant", "wsd", "rsqrt"]
)
def test_every_schedule_applies_layer_decay_and_warm_up(name: str, by: list[str]) -> None:
    flags = ["--sched", name, "--layer-decay", 0.5, "--lr", 1.0, "--warmup-lr", 0.125, *by]
    flags += ["--decay-epochs", 3] if name in ("step", "wsd", "rsqrt") else []
    config = configured(*flags, "--epochs", 8, "--warmup-epochs", 2)
    optimizer = make_optimizer(config.optimiser, Scaled(), lr=1.0)
    scheduler, epochs = make_schedule(config.schedule, optimizer, updates=4, images=128)
    assert scheduler is not None
    peaks = []
    for epoch in range(epochs):
        set_schedule(scheduler, epoch, 4 * epoch)
        (rate,) = {group["lr"] / group["lr_scale"] for group in optimizer.param_groups}
        peaks.append(rate)
    assert {group["lr_scale"] for group in optimizer.param_groups} == {0.25, 0.5, 1.0}
    # tanh is not quite at its peak where the warm-up ends
    assert peaks[0] == 0.125 and peaks[1] == pytest.approx(0.5625, rel=1e-3)
    assert max(peaks[2:]) <= 1.0
    if name == "constant":
        assert peaks[2:] == [1.0] * 6


@pytest.mark.parametrize("more", [[], ["--layer-decay", 0.5], ["--warmup-epochs", 0]])
def test_no_schedule_at_all_is_refused(folder: Path, tmp_path: Path, more: list[Any]) -> None:
    """timm applies layer decay and warm-up in its schedules alone."""
    with pytest.raises(UserError, match="--layer-decay out without a word: use --sched constant"):
        set_up(tiny_run(folder, tmp_path / "run", "--sched", "none", "--lr", 1e-3, *more))


@pytest.mark.parametrize("more", [(), ("--warmup-prefix",)])
@pytest.mark.parametrize("name", ["step", "multistep", "constant"])
def test_a_cool_down_that_a_schedule_does_not_have(name: str, more: tuple[str, ...]) -> None:
    config = configured(*SCHEDULE, "--sched", name, *more).schedule
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1e-3)
    with pytest.raises(UserError, match=f"--sched {name} has no cool-down: leave --cooldown"):
        make_schedule(config, optimizer, 2, 12)


def test_an_optimiser_that_wants_second_derivatives() -> None:
    config = configured("--opt", "adahessian").optimiser
    with pytest.raises(UserError, match="--opt adahessian needs second derivatives"):
        make_optimizer(config, torch.nn.Linear(2, 2), 1e-3)


@pytest.mark.parametrize("metric", ["loss", "top1"])
def test_what_is_not_a_number_is_never_the_best(metric: str) -> None:
    better = functools.partial(epochs_of_a_run._better, metric=metric)
    assert better(0.5, math.nan) and not better(math.nan, 0.5) and not better(math.nan, math.nan)
    assert better(0.1, 0.2) == (metric == "loss")
    row = {"epoch": 1, f"eval_{metric}": math.nan, f"ema_{metric}": 0.5}
    assert epochs_of_a_run._best_of(row, metric)["weights"] == "ema"


def test_warm_up_of_a_part_of_an_epoch() -> None:
    flags = ["--lr", "1", "--warmup-lr", "0", "--epochs", "1", "--warmup-epochs", "0.25"]
    config = configured(*flags, "--sched-on-updates", "--min-lr", 0).schedule
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    scheduler, epochs = make_schedule(config, optimizer, updates=40, images=128)
    assert scheduler is not None and epochs == 1
    rates = []
    for update in range(41):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:10] == pytest.approx([update / 10 for update in range(10)])
    cosine = [(1 + math.cos(math.pi * update / 40)) / 2 for update in range(10, 41)]
    assert rates[10:] == pytest.approx(cosine)
