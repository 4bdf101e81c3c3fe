"""Write docs/commands.md, every command with its arguments and options, from what `--help` tells.

python tools/write_command_reference.py            write it
python tools/write_command_reference.py --check    exit 1 when the committed file is not up to date
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from dapo_megatron.cli import app
from dapo_megatron.files import write_text_atomically

REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "commands.md"

HEADER = """\
# Commands

Every command, its arguments and its options, as `dapo-megatron COMMAND --help` tells them. This file is written by
`python tools/write_command_reference.py` from `dapo_megatron/cli.py`; edit the texts there. Examples of each, and what
exit codes mean: [README](../README.md#commands).

`KEY=VALUE` changes a setting of the recipe, any number of times: `run.steps=80`. All keys: [recipe.md](recipe.md).
"""


def render_reference() -> str:
    """The whole of docs/commands.md."""
    commands = list(_commands(typer.main.get_command(app), ()))
    rows = [f"| [`{' '.join(path)}`](#{'-'.join(path)}) | {_text(command.help)} |" for path, command in commands]
    parts = [HEADER, "\n".join(["| command | what it does |", "| --- | --- |", *rows]) + "\n"]
    return "\n".join(parts + [_section(path, command) for path, command in commands])


def _commands(group: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(names, command) of all that can be called; groups are walked into."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, (*path, name))
        else:
            yield (*path, name), command


def _section(path: tuple[str, ...], command: Any) -> str:
    shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    arguments = [p for p in shown if p.param_type_name == "argument"]
    usage = " ".join(["dapo-megatron", *path, *map(_placeholder, arguments)])
    lines = [f"## {' '.join(path)}", "", _text(command.help), "", "```text", usage, "```", ""]
    rows = [f"| `{_placeholder(p)}` | {_text(p.help)} | |" for p in arguments if p.name != "overrides"]
    options = [p for p in shown if p.param_type_name == "option" and p.name != "help"]
    rows += [f"| `{_names(p)}` | {_text(p.help)} | {_default(p)} |" for p in options]
    return "\n".join([*lines, "| | meaning | default |", "| --- | --- | --- |", *rows]) + "\n"


def _placeholder(argument: Any) -> str:
    if argument.name == "overrides":
        return "[KEY=VALUE …]"
    name = argument.name.upper() + (" …" if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _names(option: Any) -> str:
    names = "/".join([*option.opts, *option.secondary_opts])
    value = option.metavar or option.name.rpartition("_")[2].upper()
    return names if option.is_flag else f"{names} {value}"


def _default(option: Any) -> str:
    if option.is_flag and option.secondary_opts and option.default is not None:
        return f"`{(option.opts if option.default else option.secondary_opts)[0]}`"
    if option.default is None or option.default is False or callable(option.default):
        return "required" if option.required else ""
    return f"`{option.default}`"


def _text(words: str | None) -> str:
    return " ".join((words or "").split()).replace("|", "\\|")


def main() -> int:
    """Write the file, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 on a difference")
    text = render_reference()
    if not parser.parse_args().check:
        write_text_atomically(REFERENCE, text)
        return 0
    if REFERENCE.is_file() and REFERENCE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{REFERENCE} is not up to date; run python tools/write_command_reference.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
