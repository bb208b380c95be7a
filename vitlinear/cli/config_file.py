"""The YAML file of flag values that ``--config`` names.

Precedence: built-in default < ``--config`` file < command line. A key of the file is the name of a
flag (``weight_decay`` or ``weight-decay``); a key that no flag has is an error, never ignored. The
key ``base`` names another such file, relative to this one, that this one is laid over. A file that
comes with the package is found by its name alone.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from vitlinear.errors import UserError, did_you_mean, one_line

from .configs import find_config
from .flags import file_name, values_by_flag
from .parser import KeyValues, Parser

# How a run was started, not what it computes: left out of the saved arguments so that
# `--config RUN/args.yaml` means "the same again", not "resume that one".
LAUNCH_KEYS = frozenset({"config", "print_config", "resume", "overwrite", "wandb_resume_id"})
BASE = "base"


def parse_with_config(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses ``argv`` over the YAML file that its ``--config`` names, if any.

    Raises:
        UserError: The file is missing, is not a YAML mapping, or holds a key or value that no
            flag accepts.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("-c", "--config", type=file_name, nargs="?", default=None)
    path = first.parse_known_args(argv)[0].config
    if path:
        parser.set_defaults(**read_config(find_config(path, "classification"), parser))
    return parser.parse_args(argv)


def read_config(
    path: Path, parser: argparse.ArgumentParser, above: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """Reads a YAML file of flag values over its base, and checks each against ``parser``.

    A value replaces the base's whole, mappings such as ``model_kwargs`` too, as on the command
    line.

    Args:
        path: The file.
        parser: Knows the flags.
        above: Files that name this one as their base, the outermost first.

    Raises:
        UserError: A file is missing, is not a YAML mapping, is its own base, or holds a key or
            value that no flag accepts; the message names the file.
    """
    what = f"--config {path}" if not above else f"{path} (base of {above[-1]})"
    if path.resolve() in [file.resolve() for file in above]:
        circle = " -> ".join(map(str, (*above, path)))
        raise UserError(f"--config {above[0]}: a file cannot be its own base: {circle}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {what}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = one_line(error)
        raise UserError(f"{what} is not valid YAML: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{what} must be a mapping of flag names to values")
    values = {}
    if BASE in content:
        base = content.pop(BASE)
        if not isinstance(base, str) or not base:
            raise UserError(f"{what}: bad value for 'base': expected a file name, got {base!r}")
        values = read_config(
            find_config(base, "classification", path.parent), parser, (*above, path)
        )
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    content = {str(key).replace("-", "_"): (key, value) for key, value in content.items()}
    for name, (key, value) in content.items():
        if name not in actions or name in LAUNCH_KEYS:
            hint = did_you_mean(name, {*actions, BASE} - LAUNCH_KEYS)
            raise UserError(f"{what}: unknown key '{key}'{hint}")
        try:
            values[name] = _converted(actions[name], value)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise UserError(f"{what}: bad value for '{key}': {error}") from error
        other = getattr(actions[name], "instead_of", None)
        if other in values and other not in content:
            values[other] = None
    return values


def _converted(action: argparse.Action, value: Any) -> Any:
    """Gives a YAML value the type its flag would have given it on the command line."""
    if value is None:
        if action.default is not None:
            raise ValueError("expected a value, got null")
        return None
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {value!r}")
        return value
    if isinstance(action, KeyValues):
        if not isinstance(value, dict):
            raise ValueError(f"expected a mapping, got {value!r}")
        return value
    if action.nargs in ("*", "+") or isinstance(action.nargs, int):
        if not isinstance(value, list):
            raise ValueError(f"expected a list, got {value!r}")
        if isinstance(action.nargs, int) and len(value) != action.nargs:
            raise ValueError(f"expected {action.nargs} values, got {len(value)}")
        return [_scalar(action, item) for item in value]
    return _scalar(action, value)


def _scalar(action: argparse.Action, value: Any) -> Any:
    if isinstance(value, (bool, list, dict)):
        raise ValueError(f"expected a single value, got {value!r}")
    # Through text, as from the command line: PyYAML reads `1e-3` as a string, argparse does not.
    converted = action.type(str(value)) if callable(action.type) else str(value)
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"expected one of {', '.join(map(str, action.choices))}, got {value!r}")
    return converted


def saved_arguments(config: Any) -> dict[str, Any]:
    """Returns the flags that describe a run, ready for YAML and for `read_config`.

    Args:
        config: A configuration that `from_arguments` made.
    """
    flags = values_by_flag(config)
    kept = {key: flags[key] for key in sorted(flags) if key not in LAUNCH_KEYS}
    # Through YAML, to compare equal to what the file gives back: a tuple is a list there.
    return yaml.safe_load(yaml.safe_dump(kept))


def printed(config: Any) -> str:
    """Returns the flags that describe a run as YAML, in the parts that the configuration has.

    A comment before each part names it and its class.

    Args:
        config: A configuration that `from_arguments` made.
    """
    saved = saved_arguments(config)
    alone, parts = {}, []
    for field in dataclasses.fields(config):
        part = getattr(config, field.name)
        if dataclasses.is_dataclass(part):
            title = f"# {field.name}: {type(part).__module__}.{type(part).__name__}\n"
            values = {key: saved[key] for key in values_by_flag(part) if key in saved}
            parts.append(title + yaml.safe_dump(values, sort_keys=False))
        elif field.name in saved:
            alone[field.name] = saved[field.name]
    return "\n".join([yaml.safe_dump(alone, sort_keys=False), *parts])
