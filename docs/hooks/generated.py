"""What pages take from the code: the measures, the commands' flags, the keys of the files. Each function is Markdown.

A page asks for one by a line `<!-- generated: NAME -->`; `GENERATED` has the names.
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

from hafs_jax.base.flags import Parser
from hafs_jax.base.options import Bounds
from hafs_jax.cli import COMMANDS

_MARK = re.compile(r"^<!-- generated: (.+?) -->$", flags=re.M)


def filled(markdown: str) -> str:
    """The page with each of its marks replaced by what it asks for."""

    def made(match: re.Match[str]) -> str:
        name, *arguments = match[1].split()
        return GENERATED[name](*arguments)

    return _MARK.sub(made, markdown)


def measures() -> str:
    """Every registered measure: a section for each result file, a definition for each measure."""
    from hafs_evaluate.results.measures import MEASURES
    from hafs_evaluate.stages import STAGES

    by_file: dict[str, list[Any]] = {}
    for measure in MEASURES.values():
        by_file.setdefault(measure.file, []).append(measure)
    stages: dict[str, list[Any]] = {}
    for stage in STAGES.values():
        stages.setdefault(stage.file, []).append(stage)
    lines = []
    for file, found in by_file.items():
        of_file = stages[file]
        names = " and ".join(stage.name for stage in of_file)
        lines += [f"## {names.replace('_', ' ').capitalize()}", "", *(_sentence(stage.help) for stage in of_file), ""]
        for measure in found:
            better = f"{measure.better} is better" if measure.better else ""
            facts = "; ".join(filter(None, [better, measure.over]))
            lines += [
                f"### {_shown(measure.sentence_name)}",
                "",
                f"`{measure.name}`{f' ({_shown(facts)})' if facts else ''}. {_shown(measure.definition)}",
                "",
                f"In `{_file_of(measure)}`: {_path_of(measure)}.",
                "",
            ]
    return "\n".join(lines)


def _file_of(measure: Any) -> str:
    return f"eval/{measure.file}" if measure.is_of_all_runs else f"eval/<run>/{measure.file}"


def _path_of(measure: Any) -> str:
    parts = [f"`{measure.path}`"] if measure.path else []
    return " and, for each dataset, ".join(parts + ([f"`{measure.per_dataset}`"] if measure.per_dataset else []))


def commands() -> str:
    """Every command of `hafs` with its usage, its description and its flags."""
    lines = []
    for name, command in COMMANDS.items():
        parser = parser_of(name)
        lines += [f"## hafs {name}", "", _sentence(command.help), ""]
        lines += _text(parser.description)
        for group in parser._action_groups:
            lines += _flags(group)
        lines += _text(parser.epilog)
    return "\n".join(lines)


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser whose help `hafs COMMAND --help` prints."""
    found: list[argparse.ArgumentParser] = []

    def caught(self: argparse.ArgumentParser, file: Any = None) -> None:
        found.append(self)

    with mock.patch.object(Parser, "print_help", caught), contextlib.suppress(SystemExit):
        importlib.import_module(COMMANDS[command].module).main([command, "--help"])
    return found[-1]


def visible_flags(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments that the help shows."""
    for action in parser._actions:
        if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
            yield action


def _flags(group: Any) -> list[str]:
    rows = []
    for action in group._group_actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        names = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.metavar or action.dest}`"
        if action.choices:
            names += " " + " \\| ".join(map(str, action.choices))
        elif action.option_strings and action.metavar and action.metavar != "X":
            names += f" {_shown(str(action.metavar))}"
        rows.append(f"| {names} | {_shown((action.help or '').replace('%%', '%'))} |")
    if not rows:
        return []
    title = (
        [] if group.title in ("options", "positional arguments", "optional arguments") else [f"**{group.title}**", ""]
    )
    said = [_shown(group.description), ""] if group.description else []
    return [*title, *said, "| flag | what it sets [its default] |", "|---|---|", *rows, ""]


def fields(*places: str) -> str:
    """The fields of dataclasses, as `module:Class`: name, type, and their help or the comment beside them."""
    lines = []
    for place in places:
        module, _, name = place.partition(":")
        cls = getattr(importlib.import_module(module), name)
        lines += ["| key | type | what |", "|---|---|---|"]
        lines += [f"| `{key}` | {_type(kind)} | {_shown(said)} |" for key, kind, said in _fields(cls)]
        lines.append("")
    return "\n".join(lines)


def config_fields() -> str:
    """The fields of the training config, one section for each of its parts."""
    from hafs_jax.config import TrainConfig

    def section(cls: type, prefix: str) -> Iterator[str]:
        yield from (f"**{prefix or 'config'}**", "", "| key | type | what | default |", "|---|---|---|---|")
        parts = []
        for field in dataclasses.fields(cls):
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
            if dataclasses.is_dataclass(default):
                parts.append((type(default), f"{prefix}{field.name}."))
                continue
            bounds = str(field.metadata.get("bounds", Bounds()))
            allowed = ", ".join(field.metadata.get("choices") or [bounds] if bounds else [])
            help = field.metadata["help"] + (f" ({allowed})" if allowed else "")
            value = "" if default == "" else f"`{list(default) if isinstance(default, tuple) else default}`"
            kind = field.type.__name__ if type(field.type) is type else str(field.type)
            yield f"| `{prefix}{field.name}` | {_type(kind)} | {_shown(help)} | {value} |"
        yield ""
        for part, name in parts:
            yield from section(part, name)

    return "\n".join(section(TrainConfig, ""))


def _fields(cls: type) -> Iterable[tuple[str, str, str]]:
    """Name, annotation and trailing comment of each field of a dataclass, from its source."""
    source = inspect.getsource(cls)
    lines = source.splitlines()
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            comment = lines[(item.end_lineno or item.lineno) - 1].partition("  # ")[2]
            yield item.target.id, ast.unparse(item.annotation), comment


def _type(annotation: str) -> str:
    """A type as JSON has it."""
    words = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "None": "null", "Any": "any"}
    annotation = re.sub(r"tuple\[(\w+), \.\.\.\]", r"list of \1", annotation)
    annotation = re.sub(r"dict\[.*?\]", "object", annotation)
    shown = re.sub(r"\w+", lambda match: words.get(match[0], match[0]), annotation)
    return shown.replace(" | ", " or ")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def _shown(text: str) -> str:
    """Plain text as Markdown that shows it: in a table too, and with placeholders such as <run>."""
    text = " ".join(text.split())
    return re.sub(r"(?<!`)([<|*_])(?!`)", r"\\\1", text) if "`" not in text else text.replace("|", "\\|")


def _text(text: str | None) -> list[str]:
    """A description or an epilog: prose as it is, anything with layout as a block."""
    if not text:
        return []
    if re.search(r"^ {2,}\S", text, flags=re.M):
        return ["```text", text.strip("\n"), "```", ""]
    return [_shown(text), ""]


def public_names(package: str) -> list[str]:
    """The names that a package offers."""
    return [name for name in importlib.import_module(package).__all__ if not name.startswith("__")]


GENERATED: dict[str, Callable[..., str]] = {
    "measures": measures,
    "commands": commands,
    "fields": fields,
    "config": config_fields,
}
