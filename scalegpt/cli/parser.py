"""The command line's manners: ``_`` or ``-`` in every flag, one-line errors with the nearest flag, an example first."""

import argparse
import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from scalegpt.config.aliases import hint
from scalegpt.config.settings import Section, field_types, limits
from scalegpt.errors import InputError
from scalegpt.storage import user_path
from scalegpt.text import MOST_SHOWN, shortened, shown

FLAGS_IN_USAGE = 12
"""With more flags than these the usage line would be a page of its own; the groups below it list them all."""

DEFAULTS = "[value] after a flag: the default where neither the preset nor a file says otherwise"
"""Said once where there are presets: what a preset sets is not what is in the brackets."""


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose mistakes raise :class:`InputError` and whose help opens with an example."""

    def __init__(self, command: str, summary: str, example: str) -> None:
        super().__init__(
            prog=f"scalegpt {command}".strip(),
            allow_abbrev=False,
            add_help=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            description=f"{summary}\n\nexample:\n  " + "\n  ".join(example.splitlines()),
        )
        # -1:3 and -1e-3 are values too, which the flag's own check refuses in words of its own.
        self._negative_number_matcher = re.compile(r"-\.?\d")
        self.add_argument("-h", "--help", action="help", help="show this and exit")
        self.add_argument("--debug", action="store_true", help="show a traceback with an error")

    def format_help(self) -> str:
        """The description with its example, then the usage: argparse has them the other way round."""
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        if "--preset" in self._option_string_actions:
            formatter.add_text(DEFAULTS)
        many = sum(bool(action.option_strings) for action in self._actions) > FLAGS_IN_USAGE
        usage = f"{self.prog} [flags]" if many else self.usage
        formatter.add_usage(usage, self._actions, self._mutually_exclusive_groups)
        for group in self._action_groups:
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        return formatter.format_help()

    def parse(self, args: Sequence[str]) -> argparse.Namespace:
        """Parse with flags spelled either way; an unknown flag names the nearest known one."""
        parsed, unknown = self.parse_known_args(with_underscores(args))
        if unknown:
            self._refuse(unknown[0])
        return parsed

    def _refuse(self, word: str) -> NoReturn:
        if not word.startswith("-"):
            raise InputError(f"unexpected argument {shown(word)}; see {self.prog} --help")
        flag = shortened(word.split("=")[0], MOST_SHOWN)
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        said = hint(flag, known)
        raise InputError(f"unknown flag {flag}{said if '; known: ' not in said else f'; see {self.prog} --help'}")

    def error(self, message: str) -> NoReturn:
        """Argparse's own complaints, as ours."""
        raise InputError(message)


def path_argument(text: str) -> str:
    """The type of a flag or argument that is a path: ``~`` means the home folder, behind ``--flag=`` too."""
    try:
        return user_path(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def with_underscores(words: Iterable[str]) -> list[str]:
    """The words with the ``-`` inside flag names turned into ``_``; values stay as they are."""
    result = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            word = f"--{name.replace('-', '_')}{equals}{value}"
        result.append(word)
    return result


def add_settings(parser: argparse.ArgumentParser, title: str, section: type[Section]) -> None:
    """A flag for every setting of a section; absent flags leave no trace in the parsed arguments.

    Values stay text here: the section converts and checks them, with the same messages as for a file.
    """
    group = parser.add_argument_group(title)
    for name, field in section.settings().items():
        default = "none" if field.default is None else str(field.default).lower()
        words = field.metadata["help"].replace("%", "%%")
        bounds = f" ({limits(field)})" if limits(field) else ""
        choices = "|".join(field.metadata["choices"])
        is_switch = field_types(field) == (bool,)
        takes_bare = is_switch or name == "compile"
        group.add_argument(
            f"--{name}",
            default=argparse.SUPPRESS,
            help=f"{words}{bounds} [{default}]",
            metavar=choices or ("true|false" if is_switch else "N" if int in field_types(field) else "X"),
            nargs="?" if takes_bare else None,
            const="on" if takes_bare else None,
        )


def given_settings(arguments: argparse.Namespace, *sections: type[Section]) -> dict[str, Any]:
    """The settings that the command line gave, by name."""
    names = {field.name for section in sections for field in dataclasses.fields(section)}
    return {name: value for name, value in vars(arguments).items() if name in names}
