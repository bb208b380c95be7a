"""An argument parser whose mistakes are `UserError`s."""

import argparse
import ast
from collections.abc import Sequence
from typing import Any, NoReturn

from vitlinear.errors import UserError, did_you_mean


class HelpFormatter(argparse.HelpFormatter):
    """Adds the default to what ``--help`` says of a flag, where the text does not tell."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.const is False:  # a flag that switches something off
            return text
        if action.default in (None, False, "", [], {}, argparse.SUPPRESS) or "default" in text:
            return text
        return f"{text} (default: %(default)s)".strip()


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UserError`, suggests near names and tells defaults."""

    def __init__(self, **kwargs: Any) -> None:
        # An abbreviation that works today would break when a later flag shares its prefix.
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(**kwargs)
        self._needs: list[tuple[str, tuple[str, ...], tuple[str, ...], str, str]] = []

    def group(self, title: str) -> argparse._ArgumentGroup:
        """Returns the group of ``--help`` with a title: the same one at each call."""
        found = (group for group in self._action_groups if group.title == title)
        return next(found, None) or self.add_argument_group(title)

    def needs(
        self,
        flag: str,
        *others: str,
        values: tuple[str, ...] = (),
        beside: str = "",
        instead: str = "",
    ) -> None:
        """Refuses a flag on a command line where nothing heeds it.

        A ``--config`` may hold it all the same: recipes have values for what is switched on later,
        or off on the command line.

        Args:
            flag: Its name, as in a ``--config``.
            *others: Flags of which one has to be given.
            values: Of which it has to have one; by default any.
            beside: Flag without which it needs none of them.
            instead: Says what to do, in place of giving one of the others.
        """
        self._needs.append((flag, others, values, beside, instead))

    def _check_needs(self, parsed: argparse.Namespace) -> None:
        for flag, others, values, beside, instead in self._needs:
            given = getattr(parsed, flag)
            if given is None or given is False or given == self.get_default(flag):
                continue
            if beside and getattr(parsed, beside) is None:
                continue
            found = [getattr(parsed, other) for other in others]
            if not (any(one in values for one in found) if values else any(found)):
                what = f" {', '.join(values)}" if values else ""
                wanted = " or ".join(_option(other) + what for other in others)
                self.error(
                    instead
                    or f"{_option(flag)} has no effect without {wanted}: add that, or leave it out"
                )

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage and exiting."""
        raise UserError(f"{message}; `{self.prog} --help` lists the options")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parses ``args``; an option nobody defined is named, with its nearest neighbours."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown and not unknown[0].startswith("-"):
            extra = " ".join(repr(word) for word in unknown)
            self.error(f"{extra}: more arguments than this command takes")
        if unknown:
            flag = unknown[0].split("=", 1)[0]
            self.error(f"unknown option {flag}{did_you_mean(flag, self._option_string_actions)}")
        self._check_needs(parsed)
        return parsed


def _option(flag: str) -> str:
    return f"--{flag.replace('_', '-')}"


class Instead(argparse.Action):
    """A flag that takes back what another, ``instead_of``, says in the file that it is laid over.

    For two flags of which the other would win. On one command line, exclude them.
    """

    def __init__(self, *args: Any, instead_of: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.instead_of = instead_of

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Stores the value."""
        setattr(namespace, self.dest, values)
        setattr(namespace, self.instead_of, None)


class KeyValues(argparse.Action):
    """``--model-kwargs a=1 b='[2,3]'`` as a dict; values are Python literals, or else strings."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Stores the pairs."""
        pairs: dict[str, Any] = {}
        for item in values or ():
            key, equals, text = str(item).partition("=")
            if not equals or not key:
                parser.error(f"{option_string}: expected KEY=VALUE, got {item!r}")
            try:
                pairs[key] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                pairs[key] = text
        setattr(namespace, self.dest, pairs)
