"""``scalegpt completion SHELL``: prints the script with which a shell completes commands, flags, values and paths.

The script contains all words that it completes, so it never starts Python. :mod:`shtab` writes it from the commands'
parsers.
"""

import argparse
import re
from collections.abc import Iterator, Sequence

import shtab

from scalegpt.cli.main import COMMANDS, command
from scalegpt.cli.parser import Parser, shape_of
from scalegpt.config.presets import preset_names, public_names
from scalegpt.hardware.gpus import Card, catalogue

SHELLS = ("bash", "zsh", "fish")

EXAMPLE = """\
scalegpt completion bash > ~/.local/share/bash-completion/completions/scalegpt
scalegpt completion zsh > "${fpath[1]}/_scalegpt"
scalegpt completion fish > ~/.config/fish/completions/scalegpt.fish"""

FILES, FOLDERS = frozenset({"FILE", "PATH", "INPUT"}), frozenset({"DIR", "FOLDER", "RUN"})
"""The names in ``--help`` for values that are paths of files, or of folders only."""


def main(argv: Sequence[str]) -> int:
    """Print the script of a shell."""
    parser = Parser("completion", "Print the script that completes ScaleGPT's commands in your shell.", EXAMPLE)
    parser.add_argument(
        "shell", choices=SHELLS, metavar="|".join(SHELLS), help="the shell; open a new one after installing the script"
    )
    shell = parser.parse(argv).shell
    print(shtab.complete(whole_parser(), shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """One parser with all commands and their actions as subcommands, which :mod:`shtab` reads."""
    parser = argparse.ArgumentParser(prog="scalegpt")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers()
    for name, summary in COMMANDS.items():
        shape = shape_of(command(name))
        if isinstance(shape, Parser):
            _add(commands, name, summary, shape)
            continue
        actions = commands.add_parser(name, help=summary).add_subparsers()
        for action, own in shape.items():
            _add(actions, action, (own.description or "").splitlines()[0], own)
    return parser


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, summary: str, shape: Parser
) -> None:
    """Add a command, with the values that its arguments may have."""
    for action in shape._actions:
        _describe(action, name)
    commands.add_parser(name, help=summary, parents=[shape], add_help=False)


def _describe(action: argparse.Action, name: str) -> None:
    """Tell :mod:`shtab` which words, or which kind of path, an argument takes."""
    metavar, words = str(action.metavar or ""), list(_names(action.dest, name))
    if action.nargs == 0:
        return
    if "|" in metavar:
        words += metavar.split("|")
    if words:
        action.choices = words
    elif metavar in FILES | FOLDERS:
        action.complete = shtab.FILE if metavar in FILES else shtab.DIRECTORY  # type: ignore[attr-defined]


def _names(argument: str, name: str) -> Iterator[str]:
    """The names of presets or cards, for an argument that takes one; else nothing."""
    if argument == "preset" or (name, argument) == ("presets", "names"):
        yield from (*preset_names(), *public_names())
    if argument == "gpu" or (name, argument) == ("gpus", "name"):
        yield from (word for card in catalogue() for word in card_words(card))


def card_words(card: Card) -> tuple[str, ...]:
    """The names of a card that are one word: its aliases, and its name as users type it, for example ``rtx4090``."""
    name = re.sub(r"(?<=[a-z])-(?=\d)", "", card.name.lower().replace(" ", "-"))
    return (name, *(alias for alias in card.aliases if " " not in alias and alias != name))
