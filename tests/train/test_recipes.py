"""The published recipes: every value, what follows from it, and that each one starts.

`VITLINEAR_RECIPES=all` starts every recipe at its own image size: eight minutes on two shared
cores, 4 GB of memory.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import yaml
from timm.layers import DropPath

from tests import golden
from tests.train.helpers import image_folder
from vitlinear import create as models
from vitlinear.checkpoints.mappings import find_mapping
from vitlinear.cli.config_file import read_config
from vitlinear.cli.flags import values_by_flag
from vitlinear.data.order import EpochBatches
from vitlinear.facts import families
from vitlinear.train import run, schedule
from vitlinear.train.average import ema_decay
from vitlinear.train.config import TrainConfig
from vitlinear.train.make_model import make_model
from vitlinear.train.optimiser import make_optimizer
from vitlinear.train.record.saved_state import read_state
from vitlinear.train.run import parse_arguments

CONFIGS = Path(__file__).parents[2] / "configs" / "classification"
OURS = {"digits_test_ravlt", "fashion_mnist_ravlt"}
RECIPES = sorted({path.stem for path in CONFIGS.glob("*.yaml")} - OURS)
FACTS = {
    name: facts
    for name, facts in yaml.safe_load(
        (Path(__file__).parents[1] / "data" / "recipes.yaml").read_text()
    ).items()
    if not name.startswith("_")
}
# Flags that `resolved` reads: a recipe that sets another one is not checked by it.
CHECKED = """
    aa amp amp_dtype aug_repeats batch_size clip_grad color_jitter cooldown_epochs crop_mode
    crop_pct cutmix drop_path epochs grad_accum_steps img_size initial_model interpolation lr
    lr_base lr_base_all lr_base_scale lr_base_size mesa mesa_start_epoch min_lr mixup mixup_mode
    mixup_prob mixup_switch_prob model model_ema model_ema_base_size model_ema_decay num_classes opt
    opt_betas opt_eps recipe_batch_size recount remode reprob sched sched_on_updates smoothing
    sync_bn train_interpolation warmup_epochs warmup_lr warmup_prefix weight_decay
    weight_decay_1d
"""
SMALLEST = """
    ravlt_t mavit_t nalaformer_xt inline_deit_tiny inline_pvt_tiny inline_swin_tiny
    inline_cswin_tiny l2vit_tiny vittt_tiny h_vittt_tiny mila_tiny pola_pvt_tiny pola_swin_tiny
"""
ALL = os.environ.get("VITLINEAR_RECIPES") == "all"


def recipe(name: str) -> TrainConfig:
    """The parsed recipe."""
    return parse_arguments(["--config", str(CONFIGS / f"{name}.yaml")])


def processes(config: TrainConfig) -> int:
    """As many as make the recipe's global batch."""
    alone = config.schedule.images_per_update(config.optimiser.grad_accum_steps, 1)
    number, rest = divmod(config.schedule.recipe_batch_size or 0, alone)
    assert number and not rest
    return number


def on_meta(config: TrainConfig) -> torch.nn.Module:
    """The recipe's model, without memory."""
    kwargs = {**config.model.model_kwargs, "device": "meta"}
    model = dataclasses.replace(config.model, model_kwargs=kwargs)
    classes = model.num_classes or 1000  # what their models have by default
    return make_model(model, config.regularisation, config.input, classes)


def optimizer_of(config: TrainConfig, model: torch.nn.Module, images: int) -> Any:
    return make_optimizer(config.optimiser, model, schedule.learning_rate(config.schedule, images))


def decayed_names(optimizer: torch.optim.Optimizer, model: torch.nn.Module, decay: float) -> Any:
    """Names of the parameters that are decayed, and of those that are not."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: dict[float, set[str]] = {decay: set(), 0.0: set()}
    for group in optimizer.param_groups:
        groups[group["weight_decay"]] |= {names[id(parameter)] for parameter in group["params"]}
    return groups[decay], groups[0.0]


def resolved(name: str) -> dict[str, Any]:
    """The run as it would go, from the objects that it would be built of."""
    config = recipe(name)
    args = SimpleNamespace(**values_by_flag(config))
    world_size, model = processes(config), on_meta(config)
    images = config.schedule.images_per_update(args.grad_accum_steps, world_size)
    optimizer = optimizer_of(config, model, images)
    decayed, undecayed = decayed_names(optimizer, model, args.weight_decay)
    updates = 7
    peaks = {group["lr"] for group in optimizer.param_groups}
    scheduler, epochs = schedule.make_schedule(config.schedule, optimizer, updates, images)
    assert scheduler is not None and len(peaks) == 1

    def rate(epoch: int) -> float:
        schedule.set_schedule(scheduler, epoch, epoch * updates)
        return optimizer.param_groups[0]["lr"]

    data = models.data_config(model, config.input.given())
    side = data.input_size[1]
    return {
        "processes": world_size,
        "batch_size": args.batch_size,
        "grad_accum_steps": args.grad_accum_steps,
        "global_batch": images,
        "opt": type(optimizer).__name__.lower(),
        "eps": optimizer.defaults["eps"],
        "betas": list(optimizer.defaults["betas"]),
        "weight_decay": args.weight_decay,
        "decayed": len(decayed),
        "undecayed": len(undecayed),
        "layer_decay": args.layer_decay,
        "clip_norm": args.clip_grad if args.clip_mode == "norm" else args.clip_mode,
        "schedule": args.sched,
        "steps": "epoch" if scheduler.t_in_epochs else "update",
        "warmup_prefix": args.warmup_prefix,
        "warmup_epochs": args.warmup_epochs,
        "epochs": epochs,
        "lr": [rate(0), peaks.pop(), rate(epochs)],
        "drop_path": round(
            max((m.drop_prob for m in model.modules() if isinstance(m, DropPath)), default=0.0), 6
        ),
        "aa": args.aa,
        "color_jitter": args.color_jitter,
        "erase": [args.reprob, args.remode, args.recount],
        "mixup": [
            args.mixup, args.cutmix, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
            args.mixup_off_epoch,
        ],
        "crop": [*args.scale, *args.ratio],
        "flip": [args.hflip, args.vflip],
        "train_interpolation": args.train_interpolation,
        "smoothing": args.smoothing,
        "repeats": args.aug_repeats,
        "classes": args.num_classes,
        "starts_from": args.initial_model,
        "sync_bn": args.sync_bn,
        "amp": args.amp_dtype if args.amp else None,
        "ema": ema_decay(config.average, images) if args.model_ema else None,
        "mesa": (
            [args.mesa, args.mesa_start_epoch, args.mesa_temperature] if args.mesa else None
        ),
        "evaluation": [
            side, int(side / data.crop_pct), data.crop_mode, data.interpolation,
        ],
    }  # fmt: skip


def test_every_published_variant_has_a_recipe() -> None:
    released = {
        name
        for family in families().values()
        for name, facts in family.models.items()
        if facts.released
    }
    assert set(RECIPES) == set(FACTS)
    assert {name.partition(".")[0] for name in RECIPES} == released
    assert all(recipe(name).model.model == name.partition(".")[0] for name in RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_as_published(name: str) -> None:
    parser_values = read_config(CONFIGS / f"{name}.yaml", run.make_parser("test"))
    assert parser_values.keys() <= set(CHECKED.split())
    found, facts = resolved(name), FACTS[name]
    assert found.keys() == facts.keys()
    for key, value in facts.items():
        if isinstance(value, list):
            assert found[key] == pytest.approx(value, rel=1e-9), key
        elif key == "ema" and value is not None:
            assert 1 - found[key] == pytest.approx(1 - value, rel=1e-9)
        else:
            assert found[key] == value, key


def table_row(name: str) -> str:
    """A recipe's row of the table in the README."""
    facts, (model, _, tag) = FACTS[name], name.partition(".")
    published = next(f.models[model].published for f in families().values() if model in f.models)
    accuracies = published.top1 if published else {}
    if not tag:  # the only ones of their model, or those that are not another recipe's
        tag = next((tag for tag in accuracies if f"{model}.{tag}" not in FACTS), "")
    return (
        f"| [{name}]({name}.yaml) | {accuracies.get(tag, 'none')} | {facts['global_batch']} | "
        f"{facts['epochs']} | {facts['lr'][1]:g} | {facts['drop_path']} |"
    )


def test_readme_lists_every_recipe() -> None:
    lines = (CONFIGS / "README.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| [")]
    assert sorted(rows) == sorted(map(table_row, RECIPES))


def released_decay(released: str) -> tuple[set[str], set[str]]:
    """Our names of what the released scripts decay, and of what they do not, by their shapes."""
    buffers = (
        "running_mean running_var num_batches_tracked RoPE.angle relative_position_index attn_mask "
        "rotations"
    )
    buffers_end = tuple(buffers.split())
    listed = ("pos_embed", "cls_token", "relative_position_bias_table")
    if released.startswith("pola_"):  # lists no other names
        listed = ("relative_position_bias_table",)
    entries = next(
        json.loads(path.read_text())[released]["state_dict"]
        for path in golden.FOLDER.glob("*.json")
        if f'"{released}"' in path.read_text()
    )
    shapes = {key: shape for key, shape, _ in entries if not key.endswith(buffers_end)}
    groups: tuple[dict[str, torch.Tensor], ...] = ({}, {})
    for key, shape in shapes.items():
        exempt = len(shape) <= 1 or key.endswith(".bias") or any(part in key for part in listed)
        groups[exempt][key] = torch.empty(shape, device="meta")
    mapping = find_mapping({**groups[0], **groups[1]})
    if mapping is None:
        return set(groups[0]), set(groups[1])
    renamed = [{mapping.rename(key) for key in mapping.stack(group)} for group in groups]
    return renamed[0], renamed[1]


@pytest.mark.parametrize(
    "name",
    # Sizes of a family have the same names of parameters.
    [
        pytest.param(name, marks=pytest.mark.nightly if i % 3 else ())
        for i, name in enumerate(name for name in RECIPES if "." not in name)
    ],
)
def test_weight_decay_spares_what_the_released_script_spares(name: str) -> None:
    """Name by name, though layer-scales and temperatures have fewer axes here."""
    released = next(f.models[name].released for f in families().values() if name in f.models)
    config = recipe(name)
    model = on_meta(config)
    optimizer = optimizer_of(config, model, images=1)
    assert decayed_names(optimizer, model, config.optimiser.weight_decay) == released_decay(
        released
    )


def test_repeated_augmentation_gives_an_epoch_of_multiples_of_256() -> None:
    """As published: three in a row over the processes, and the epoch no longer than without."""
    parts = []
    for rank in range(8):
        batches = EpochBatches(1000, batch_size=4, repeats=3, rank=rank, world_size=8)
        batches.start(seed=0, epoch=0)
        parts.append([place for batch in batches for place in batch])
    assert [len(part) for part in parts] == [768 // 8] * 8
    mixed = [place for step in zip(*parts, strict=True) for place in step]
    images = [place.image for place in mixed]
    assert all(len(set(images[start : start + 3])) == 1 for start in range(0, 768, 3))
    assert len(set(images)) == 256
    assert len({place.seed for place in mixed}) == 768


def start_weights(config: TrainConfig, folder: Path) -> list[str]:
    """Flags that give a fine-tuning recipe what it starts from: 22k has five classes here."""
    if config.start.initial_model is None:
        return []
    weights = timm.create_model(config.start.initial_model, num_classes=5).state_dict()
    safetensors.torch.save_file(weights, folder / "start.safetensors")
    (folder / "map.txt").write_text("4\n0\n2\n")
    flags = ["--initial-checkpoint", str(folder / "start.safetensors")]
    return [*flags, "--initial-head-map", str(folder / "map.txt")]


# Those that run every time, with one block of each kind: the others of a stage are alike.
FEWER_BLOCKS = {
    "ravlt_t": "depths=(1,1,1,1)",
    "inline_pvt_tiny": "depths=(1,1,1,1)",
    "vittt_tiny": "depth=1",
    "pola_swin_tiny": "depths=(2,1,1,1)",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    RECIPES
    if ALL
    else [
        pytest.param(name, marks=() if name in FEWER_BLOCKS else pytest.mark.nightly)
        for name in SMALLEST.split()
    ],
)
def test_recipe_makes_an_update(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = image_folder(tmp_path / "images", train=1, val=1)
    config = recipe(name)
    flags = ["--config", str(CONFIGS / f"{name}.yaml"), "--data-dir", str(data)]
    flags += ["--output", str(tmp_path / "run"), "--device", "cpu", "-j", "0", "--no-plot"]
    flags += ["-b", "2", "--stop-epoch", "1", "--num-classes", "3", "--opt-kwargs", "foreach=False"]
    # Float16 on a CPU is slow, and its scaler may skip the first update.
    flags += ["--amp-dtype", "bfloat16"] if config.device.amp else []
    flags += start_weights(config, tmp_path)
    flags += [] if ALL else ["--img-size", "64"]
    if name in FEWER_BLOCKS and not ALL:
        assert not config.model.model_kwargs
        flags += ["--model-kwargs", FEWER_BLOCKS[name]]
    result = run.train(parse_arguments(flags))
    assert result["epoch"] == 1
    state = read_state(tmp_path / "run" / "last_state.pt")
    assert state["updates"] == 1
    assert {int(entry["step"]) for entry in state["optimizer"]["state"].values()} == {1}
    assert ("state_dict_ema" in state) == config.average.model_ema
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    alone = parse_arguments(flags).schedule
    images = alone.images_per_update(config.optimiser.grad_accum_steps, 1)
    first = schedule.warmup_and_min_rate(alone, images)[0]
    peak = schedule.learning_rate(alone, images)
    assert row["lr"] == pytest.approx(first if alone.warmup_epochs else peak)
    printed = capsys.readouterr().out
    assert f"the recipe's is {alone.recipe_batch_size}: peak learning rate" in printed
    assert "starting a new one" not in printed
    saved = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert saved["recipe_batch_size"] == alone.recipe_batch_size and "base" not in saved
    shutil.rmtree(tmp_path)  # up to 2 GB


def test_fine_tuning_recipes_refuse_to_start_from_nothing(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "images", train=1, val=1)
    for name in (name for name in RECIPES if FACTS[name]["starts_from"]):
        flags = ["--config", str(CONFIGS / f"{name}.yaml"), "--data-dir", str(data), "-b", "2"]
        with pytest.raises(models.UserError, match="is to start from weights of .* FILE"):
            run.train(parse_arguments([*flags, "--output", str(tmp_path / "run")]))
    assert not (tmp_path / "run").exists()
