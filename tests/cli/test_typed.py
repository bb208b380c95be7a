"""Typed configurations: one field for each flag, frozen, and no parsed flags below the parsing."""

import argparse
import ast
import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import vitlinear
from vitlinear.benchmark import command as benchmark
from vitlinear.cli.flags import from_arguments, values_by_flag
from vitlinear.cli.parser import Parser
from vitlinear.data import check_data
from vitlinear.evaluation import predict, stream_image, validate
from vitlinear.export import command as export
from vitlinear.train import compare_runs
from vitlinear.train import run as train
from vitlinear.tune import command as tune
from vitlinear.tune import doctor

# Each with a command line that parses.
COMMANDS: dict[str, tuple[ModuleType, list[str]]] = {
    "train": (train, []),
    "validate": (validate, []),
    "predict": (predict, ["image.png"]),
    "stream": (stream_image, ["test_ravlt", "image.npy", "--output", "map.npy"]),
    "check-data": (check_data, []),
    "compare-runs": (compare_runs, ["run"]),
    "export": (export, ["test_ravlt", "out.onnx"]),
    "benchmark": (benchmark, ["test_ravlt"]),
    "tune": (tune, []),
    "doctor": (doctor, []),
}


def flags_of(module: ModuleType, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of everything that a command's parser gives a value."""
    found: set[str] = set()
    parse = Parser.parse_args

    def note(self: Parser, *args: Any, **kwargs: Any) -> argparse.Namespace:
        found.update(action.dest for action in self._actions if action.dest != "help")
        return parse(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", note)
        module.parse_arguments(argv)
    return found


def parts(config: Any) -> Iterator[Any]:
    """The configuration and every dataclass in it."""
    yield config
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from parts(value)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_one_field(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, argv = COMMANDS[name]
    config = module.parse_arguments(argv)
    fields = [
        field.name
        for part in parts(config)
        for field in dataclasses.fields(part)
        if not dataclasses.is_dataclass(getattr(part, field.name))
    ]
    assert len(fields) == len(set(fields))
    assert set(fields) == flags_of(module, argv, monkeypatch) == values_by_flag(config).keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_configurations_are_frozen(name: str) -> None:
    module, argv = COMMANDS[name]
    for part in parts(module.parse_arguments(argv)):
        field = dataclasses.fields(part)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, field, None)
        assert not any(isinstance(value, list) for value in vars(part).values())


@pytest.mark.parametrize("name", COMMANDS)
def test_values_have_the_types_of_their_fields(name: str) -> None:
    """Of the built-in types; flags without a type give text."""
    plain = (str, int, float, bool, type(None))
    module, argv = COMMANDS[name]
    for part in parts(module.parse_arguments(argv)):
        hints = typing.get_type_hints(type(part))
        for field in dataclasses.fields(part):
            wanted, value = hints[field.name], getattr(part, field.name)
            allowed = typing.get_args(wanted) or (wanted,)
            if typing.get_origin(wanted) is tuple or not set(allowed) <= set(plain):
                continue
            if float in allowed:
                allowed = (*allowed, int)
            assert type(value) in allowed, (field.name, value)


@dataclasses.dataclass(frozen=True)
class Inner:
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Outer:
    count: int
    inner: Inner


def test_a_configuration_of_arguments_and_back() -> None:
    config = from_arguments(Outer, argparse.Namespace(count=1, names=["a", "b"], other=2))
    assert config == Outer(1, Inner(("a", "b")))
    assert values_by_flag(config) == {"count": 1, "names": ("a", "b")}
    with pytest.raises(AttributeError, match="names"):
        from_arguments(Outer, argparse.Namespace(count=1))


@pytest.mark.parametrize(
    "room", ["train", "data", "evaluation", "export", "benchmark", "tune", "dense/openmmlab"]
)
def test_no_function_takes_parsed_flags(room: str) -> None:
    files = sorted((Path(vitlinear.__file__).parent / room).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                for argument in every:
                    annotation = ast.unparse(argument.annotation) if argument.annotation else ""
                    assert "Namespace" not in annotation, f"{file.name}: {ast.unparse(node.args)}"
                    assert argument.arg != "args", file.name
