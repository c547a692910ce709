"""Command lines: a parser that answers a mistake with one line, its help, and flags for the fields of a config.

Nested dataclasses become dotted flags (`--penalty.lam-max 1`), the same path that the field has in the saved
`config.json`. Standard library only.
"""

import argparse
import dataclasses
import os
import re
import sys
import textwrap
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from hafs_jax.base.errors import in_one_line, note_flags
from hafs_jax.base.options import Bounds, did_you_mean, is_optional

C = TypeVar("C")
WIDTH = 80
"""The most columns that a help takes, and fewer in a narrower terminal."""

HABITS = {
    "--batch": "--batch-size",
    "--data": "--store",
    "--d-sae": "--sae.n-latents",
    "--dict-size": "--sae.n-latents",
    "--epochs": "--passes",
    "--l0": "--k",
    "--lambda": "--lam",
    "--output": "--out",
    "--steps": "--tokens",
    "--width": "--sae.n-latents",
}
"""Flags of other programs, and what they are called here."""


class Help(argparse.HelpFormatter):
    """Help of at most `WIDTH` columns: `usage: PROG [options] ARGUMENTS`, long flags on lines of their own.

    Descriptions and epilogs keep their line ends where they have any, and are filled where they are one line.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=20)
        self._width = min(self._width, WIDTH - 2)

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        words = [self._prog]
        needed = [action for action in actions if action.option_strings and action.required]
        words += [f"{action.option_strings[0]} {self._metavar(action)}" for action in needed]
        words += ["[options]"]
        for action in (action for action in actions if not action.option_strings):
            words.append(self._format_args(action, self._metavar(action)))
        text = textwrap.fill(" ".join(words), self._width, initial_indent="usage: ", subsequent_indent=" " * 9)
        self._add_item(lambda: text + "\n\n", [])

    def _metavar(self, action: argparse.Action) -> str:
        return str(self._metavar_formatter(action, action.dest.rpartition(".")[2].upper())(1)[0])

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        """'X ...' for one or more: a list of choices is long enough once."""
        if action.nargs != argparse.ONE_OR_MORE:
            return super()._format_args(action, default_metavar)
        return f"{self._metavar_formatter(action, default_metavar)(1)[0]} ..."

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text.strip():
            return "".join(indent + line for line in text.splitlines(keepends=True))
        return textwrap.fill(" ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """'--sae.k, --k X', '--force': the metavar once, and of a switch that can be turned off both names."""
        if not action.option_strings:
            return super()._format_action_invocation(action)
        flags = ", ".join(action.option_strings)
        return flags if action.nargs == 0 else f"{flags} {self._format_args(action, self._metavar(action))}"


class Parser(argparse.ArgumentParser):
    """An argument parser whose every complaint is one line and exit code 2, with the nearest flag suggested."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": Help, **kwargs})

    def error(self, message: str) -> NoReturn:
        print(f"error: {in_one_line(message)}; see `{self.prog} --help`", file=sys.stderr)
        raise SystemExit(2)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """The same, but the value of `--flag=--` is "--", as since Python 3.13; before, it is an empty list."""
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            value = self._get_value(action, "--")
            self._check_value(action, value)
            return value
        return super()._get_values(action, arg_strings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The same, and notes how each option was written, for the errors that name it (see `errors.arg`).

        Without any argument, a command that needs some prints its help, and the exit code is 2.
        """
        given_words = [str(word) for word in (sys.argv[1:] if args is None else args)]
        for word in given_words:
            try:
                os.fsencode(word)
            except UnicodeEncodeError:  # of Python's callers: no shell can say it
                self.error(f"expected arguments that can be written, found {word!a}")
        words = [word.partition("=")[0] for word in given_words]
        if not words and any(action.required for action in self._actions):
            self.print_help(sys.stderr)
            raise SystemExit(2)
        noted = {}
        for action in self._actions:
            if flags := [flag for flag in action.option_strings if flag.startswith("--")]:
                given = next((flag for flag in flags if flag in words and not flag.startswith("--no-")), flags[0])
                noted[action.dest] = given
        note_flags(noted)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.unknown(unknown[0])
        return parsed

    def unknown(self, argument: str) -> NoReturn:
        """Complains of an argument that there is not, and suggests the flag that may be meant."""
        word = argument.partition("=")[0]
        flags = [flag for action in self._actions for flag in action.option_strings]
        meant = [flag for flag in flags if flag == HABITS.get(word)]
        meant += [flag for flag in flags if flag.rpartition(".")[2] == word.lstrip("-") and "." in flag]
        near = f"; did you mean {meant[0]!r}?" if meant else did_you_mean(word, flags)
        self.error(f"unknown argument {argument!r}{near}")


def add_flags(
    parser: argparse._ActionsContainer,
    default: Any,
    prefix: str = "",
    skip: Sequence[str] = (),
    aliases: Mapping[str, str] | None = None,
    groups: Mapping[str, argparse._ActionsContainer] | None = None,
) -> None:
    """Adds a flag for every field of the config `default`; the help shows the field's line and default value.

    `skip` names dotted fields that the caller sets in another way. `aliases` gives further names of a field's flag:
    {alias: field}. `groups` says in which part of the help a field stands, by its name or by that of the part of the
    config that it lies in. A flag that is not given adds nothing to the parsed namespace, so that `with_flags` changes
    only what the user named.
    """
    hints = typing.get_type_hints(type(default))
    for field in dataclasses.fields(default):
        path, value = prefix + field.name, getattr(default, field.name)
        if path in skip:
            continue
        if dataclasses.is_dataclass(value):
            add_flags(parser, value, path + ".", skip, aliases, groups)
            continue
        bounds = field.metadata.get("bounds", Bounds()).in_help
        allowed = f" ({bounds})" if bounds else ""
        help, kind = field.metadata.get("help", ""), hints[field.name]
        choices = field.metadata.get("choices")
        is_short = choices and len(",".join(choices)) < 40
        if choices and not is_short and not all(choice in help for choice in choices):
            allowed = f": {', '.join(choices)}"
        help_line = f"{help}{allowed}{_default(value, help)}".replace("%", "%%")
        names = ["--" + path.replace("_", "-"), *(f"--{name}" for name, of in (aliases or {}).items() if of == path)]
        common: dict[str, Any] = {"dest": path, "default": argparse.SUPPRESS, "help": help_line}
        group = (groups or {}).get(path) or (groups or {}).get(prefix.rstrip(".")) or parser
        if kind is bool:
            group.add_argument(*names, action=argparse.BooleanOptionalAction, **common)
        else:
            several = typing.get_origin(kind) is tuple
            item = typing.get_args(kind)[0] if several else kind
            common |= {"type": _scalar(item), "choices": choices, "metavar": None if is_short else "X"}
            group.add_argument(*names, nargs="+" if several else None, **common)


def with_flags(default: C, namespace: argparse.Namespace) -> C:
    """The config `default` with the fields that the command line named replaced, and validated again."""
    changes: dict[str, Any] = {}
    for path, value in vars(namespace).items():
        node = changes
        *parents, leaf = path.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = tuple(value) if isinstance(value, list) else value

    def replaced(config: Any, values: dict[str, Any]) -> Any:
        known = {field.name for field in dataclasses.fields(config)}
        return dataclasses.replace(
            config,
            **{
                key: replaced(getattr(config, key), value) if isinstance(value, dict) else value
                for key, value in values.items()
                if key in known
            },
        )

    return replaced(default, changes)


def _default(value: Any, help: str) -> str:
    """The default as the end of a line of help: ' [0.5]'; nothing where the help says what 'none' or '' stands for."""
    if value in (None, "", ()):
        return "" if re.search(r"\b(none|empty|none named):", help) else " [none]"
    if isinstance(value, bool):
        return " [on]" if value else " [off]"
    return f" [{' '.join(map(str, value)) if isinstance(value, tuple) else value}]"


def _scalar(kind: Any) -> Any:
    inner, optional = is_optional(kind)

    def parse(text: str) -> Any:
        return None if optional and text.lower() == "none" else inner(text)

    parse.__name__ = getattr(inner, "__name__", str(inner))
    return parse
