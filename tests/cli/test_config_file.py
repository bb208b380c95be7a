"""Flags over YAML over defaults."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from vitlinear.cli.config_file import LAUNCH_KEYS, read_config, saved_arguments
from vitlinear.cli.flags import values_by_flag
from vitlinear.errors import UserError
from vitlinear.train import compare_runs
from vitlinear.train.run import main as run_command
from vitlinear.train.run import make_parser, parse_arguments

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "classification").glob("*.yaml"))


def parsed(flags: Sequence[str]) -> SimpleNamespace:
    """Parsed values by flag; sequences are lists, as in YAML."""
    values = values_by_flag(parse_arguments(flags))
    return SimpleNamespace(
        **{key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
    )


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_precedence_is_default_then_file_then_flag(tmp_path: Path) -> None:
    config = written(tmp_path, "epochs: 7\nbatch-size: 16\namp: true\nlr: 1e-3\n")
    args = parsed(["--epochs", "9", "-c", config, "--no-amp"])
    assert (args.epochs, args.batch_size, args.amp, args.weight_decay) == (9, 16, False, 0.05)
    assert args.lr == 1e-3  # PyYAML reads 1e-3 as a string


def test_a_peak_rate_goes_over_one_of_the_other_kind(tmp_path: Path) -> None:
    """``lr`` wins where one file or one run has both, but not over what is laid over it."""
    base = written(tmp_path, "lr: 4e-3\n")
    over = tmp_path / "over.yaml"
    over.write_text("base: config.yaml\nlr-base: 1e-6\n")
    given = parsed(["--config", base, "--lr-base", "5e-4"])  # the default, too
    for args, rate in ((given, 5e-4), (parsed(["--config", str(over)]), 1e-6)):
        assert (args.lr, args.lr_base) == (None, rate)
    assert parsed(["--config", str(over), "--lr", "0.1"]).lr == 0.1
    over.write_text("base: config.yaml\nlr-base: 1e-6\nlr: 2e-3\n")
    assert parsed(["--config", str(over)]).lr == 2e-3


@pytest.mark.parametrize("flag", [["--lr-base-size", "1024"], ["--lr-base-scale", "sqrt"]])
def test_scaling_of_a_rate_that_is_not_scaled(tmp_path: Path, flag: list[str]) -> None:
    recipe = ["--config", written(tmp_path, "lr: 4e-3\n")]
    with pytest.raises(
        UserError, match=f"--lr is absolute: give --lr-base .* leave {flag[0]} out;"
    ):
        parse_arguments([*recipe, *flag])
    for more in (["--lr-base", "1e-3"], ["--lr-base-all"]):
        parse_arguments([*recipe, *flag, *more])
    parse_arguments(["--config", written(tmp_path, "lr_base_size: 1024\n"), "--lr", "1e-3"])


def test_home_is_found_after_an_equals_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shells replace ``~`` only at the start of a word."""
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path, "kd_checkpoint: ~/teacher.pth\n")
    args = parsed(["--config=~/config.yaml", "--initial-checkpoint=~/start.pth"])
    assert args.kd_checkpoint == str(tmp_path / "teacher.pth")
    assert args.initial_checkpoint == str(tmp_path / "start.pth")
    compared = compare_runs.parse_arguments(["a", "--output=~/a.png", "--csv=~/a.csv"])
    assert (compared.output, compared.csv) == (str(tmp_path / "a.png"), str(tmp_path / "a.csv"))


def test_the_command_line_takes_any_flag_of_the_file_back(tmp_path: Path) -> None:
    actions = {x.dest: x for x in make_parser("train")._actions if x.nargs == 0}
    names = sorted(actions.keys() - LAUNCH_KEYS - {"help"})
    config = written(tmp_path, yaml.safe_dump(dict.fromkeys(names, True)))
    back = ["--aug" if name == "no_aug" else f"--no-{name.replace('_', '-')}" for name in names]
    for flags, expected in (([], True), (back, False)):
        args = parsed(["--config", config, *flags])
        assert {name for name in names if getattr(args, name) is expected} == set(names)
    assert {"amp", "channels_last", "log_wandb", "no_aug"} <= set(names)


def test_lists_and_mappings(tmp_path: Path) -> None:
    config = written(tmp_path, "scale: [0.5, 1]\nmodel_kwargs: {depths: [1, 1], act: gelu}\n")
    args = parsed(["--config", config])
    assert args.scale == [0.5, 1.0]
    assert args.model_kwargs == {"depths": [1, 1], "act": "gelu"}
    args = parsed(["--config", config, "--model-kwargs", "depths=(2,2)", "name=x"])
    assert args.model_kwargs == {"depths": (2, 2), "name": "x"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weigth_decay: 0.1", "unknown key 'weigth_decay' (did you mean weight_decay"),
        ("resume: auto", "unknown key 'resume'"),
        ("help: true", "unknown key 'help'"),
        ("epochs: many", "bad value for 'epochs': invalid literal"),
        ("epochs: 1.5", "bad value for 'epochs'"),
        ("epochs: 0", "must be at least 1"),
        ("amp: 1", "expected true or false"),
        ("epochs: null", "bad value for 'epochs': expected a value, got null"),
        ("lr: [1]", "expected a single value"),
        ("scale: 0.5", "expected a list"),
        ("scale: [0.5]", "expected 2 values, got 1"),
        ("model_kwargs: [1]", "expected a mapping"),
        ("clip_mode: soft", "expected one of norm, value, agc"),
        ("- 1", "must be a mapping"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_arguments(["--config", written(tmp_path, text)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epoch", "3"], "unknown option --epoch (did you mean --epochs"),
        (["--epochs"], "argument --epochs: expected one argument"),
        (["--epochs", "x"], "invalid int value: 'x'"),
        (["--lr", "-1"], "must be at least 0"),
        (["--lr", "nan"], "must be at least 0"),
        (["--lr", "inf"], "must be finite"),
        (["--lr", "1", "--lr-base", "1"], "argument --lr-base: not allowed with argument --lr"),
        (["--smoothing", "1"], "must be below 1"),
        (["--drop-path", "1.5"], "must be at most 1"),
        (["--hflip", "3"], "must be at most 1"),
        (["--ratio", "0", "0"], "must be at least 1e-06"),
        (["--decay-epochs", "0"], "must be at least 1e-06"),
        (["--std", "0"], "must be at least 1e-06"),
        (["--seed", "5000000000"], "must be at most 4294967295"),
        (["--model-kwargs", "depth"], "expected KEY=VALUE, got 'depth'"),
        (["--config", "/nowhere.yaml"], "cannot read --config /nowhere.yaml"),
    ],
)
def test_bad_flags_say_what_is_wrong(flags: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_arguments(flags)
    assert message in str(caught.value)


def test_help_tells_what_each_flag_does_and_its_default() -> None:
    parser = make_parser("vitlinear train")
    assert [action.dest for action in parser._actions if not action.help] == []
    text = " ".join(parser.format_help().split())
    assert "--lr-base-scale {linear,sqrt} how it follows their number (default: linear)" in text
    assert "default: None" not in text and "default: False" not in text


def test_saved_arguments_are_a_config_again(tmp_path: Path) -> None:
    flags = [
        "--model-kwargs",
        "depths=[1,1]",
        "--opt-betas",
        "0.9",
        "0.95",
        "--amp",
        "--lr",
        "3e-4",
    ]
    config = parse_arguments([*flags, "--resume", "auto", "--overwrite"])
    file = written(tmp_path, yaml.safe_dump(saved_arguments(config)))
    again = parse_arguments(["--config", file])
    assert saved_arguments(again) == saved_arguments(config)
    assert (again.folder.resume, again.folder.overwrite) == (None, False)


def test_printed_flags_are_a_config_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bases, file and command line resolved; nothing is trained and no data is needed."""
    recipe = str(next(path for path in CONFIGS if path.stem == "inline_swin_base_384"))
    run_command(["--config", recipe, "--epochs", "7", "--print-config"])
    printed = capsys.readouterr().out
    config = parse_arguments(["--config", written(tmp_path, printed)])
    assert (config.schedule.epochs, config.schedule.min_lr) == (7, 2e-7)
    assert config.augmentation.aa == "rand-m9-mstd0.5-inc1"
    assert saved_arguments(config) == yaml.safe_load(printed) and not config.print_config
    assert "# schedule: vitlinear.train.schedule.ScheduleConfig\nepochs: 7\n" in printed


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_parse(path: Path) -> None:
    args = parsed(["--config", str(path)])
    for key, value in yaml.safe_load(path.read_text()).items():
        assert key == "base" or getattr(args, key) == value


def test_a_file_is_laid_over_its_base(tmp_path: Path) -> None:
    """Bases lie where the file says, relative to itself, and may have their own."""
    (tmp_path / "shared").mkdir()
    written(tmp_path / "shared", "base: ../ground.yaml\nepochs: 8\nopt-kwargs: {a: 1, b: 2}\n")
    (tmp_path / "ground.yaml").write_text("epochs: 7\nlr: 1e-3\nweight_decay: 0.3\n")
    top = tmp_path / "top.yaml"
    top.write_text("opt_kwargs: {b: 3}\nweight-decay: 0.4\nbase: shared/config.yaml\n")
    flags = ["--config", str(top), "--batch-size", "4"]
    args = parsed(flags)
    assert (args.epochs, args.lr, args.weight_decay, args.batch_size) == (8, 1e-3, 0.4, 4)
    assert args.opt_kwargs == {"b": 3}
    saved = saved_arguments(parse_arguments(flags))
    assert "base" not in saved and (saved["epochs"], saved["lr"]) == (8, 1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: none.yaml", "cannot read {0}/none.yaml (base of {0}/config.yaml): No such file"),
        ("base: [a.yaml]", "config.yaml: bad value for 'base': expected a file name, got ['a.yaml"),
        ("base:", "bad value for 'base': expected a file name, got None"),
        ("base: config.yaml", "cannot be its own base: {0}/config.yaml -> {0}/config.yaml"),
        ("base: circle.yaml", "own base: {0}/config.yaml -> {0}/circle.yaml -> {0}/config.yaml"),
        ("base: wrong.yaml", "{0}/wrong.yaml (base of {0}/config.yaml): unknown key 'epoch' (did"),
        ("base: list.yaml", "{0}/list.yaml (base of {0}/config.yaml) must be a mapping"),
        ("bsae: x.yaml", "unknown key 'bsae' (did you mean base"),
    ],
)
def test_bad_bases_say_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "circle.yaml").write_text("base: config.yaml\n")
    (tmp_path / "wrong.yaml").write_text("epoch: 3\n")
    (tmp_path / "list.yaml").write_text("- 3\n")
    with pytest.raises(UserError) as caught:
        parse_arguments(["--config", written(tmp_path, text)])
    assert message.format(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_config_needs_no_command_line(tmp_path: Path) -> None:
    from vitlinear.cli.parser import Parser

    parser = Parser(prog="x")
    parser.add_argument("--count", type=int)
    assert read_config(Path(written(tmp_path, "count: 3")), parser) == {"count": 3}
