"""The command line parser: ``_`` or ``-`` in flags, one-line errors with the nearest flag, examples in the help."""

import argparse
import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NoReturn

from scalegpt.config import DataConfig, ModelConfig, ParallelConfig, TrainConfig
from scalegpt.config.aliases import hint
from scalegpt.config.run import AUTO, PLANNED, PLANNED_BY_DEFAULT
from scalegpt.config.settings import Section, field_types, limits
from scalegpt.errors import InputError, nearest
from scalegpt.storage import user_path
from scalegpt.text import MOST_SHOWN, shortened, shown

FLAGS_IN_USAGE = 12
"""A command with more flags than this does not list them in its usage line."""

DEFAULTS = "[value] after a flag: its default, unless the preset or a configuration file sets another value"

RUN_SECTIONS = {"data": DataConfig, "parallel layout": ParallelConfig, "training": TrainConfig, "model": ModelConfig}
"""Title in ``--help`` → a section of a run's settings, in the order of ``--help``."""


_collecting: ContextVar[bool] = ContextVar("collecting", default=False)


class ShapeFound(Exception):  # noqa: N818 - no error
    """Raised inside :func:`shape_of` instead of parsing. ``shape`` is the value that the function returns."""

    def __init__(self, shape: "Parser | dict[str, Parser]") -> None:
        super().__init__()
        self.shape = shape


def shape_of(command: Callable[[list[str]], int]) -> "Parser | dict[str, Parser]":
    """The parser of a command, or of each of its actions by the action's name, taken from the command itself.

    The command runs up to where it would parse its arguments.
    """
    before = _collecting.set(True)
    try:
        command([])
    except ShapeFound as found:
        return found.shape
    finally:
        _collecting.reset(before)
    raise TypeError(f"{command.__module__} parses no arguments")


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are :class:`InputError`, and whose help begins with an example."""

    def __init__(self, command: str, summary: str, example: str) -> None:
        super().__init__(
            prog=f"scalegpt {command}".strip(),
            allow_abbrev=False,
            add_help=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            description=f"{summary}\n\nexample:\n  " + "\n  ".join(example.splitlines()),
        )
        # Read -1:3 and -1e-3 as values, not as flags; the check of the flag before them then refuses them.
        self._negative_number_matcher = re.compile(r"-\.?\d")
        self.add_argument("-h", "--help", action="help", help="show this and exit")
        self.add_argument("--debug", action="store_true", help="show a traceback with an error")

    def format_help(self) -> str:
        """The help text: first the description with its example, then the usage, which argparse would put first."""
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
        """Parse the arguments; flags may be spelled with ``_`` or with ``-``.

        Raises:
            InputError: a flag is unknown (the message names the nearest known flag), or a value is missing.
        """
        if _collecting.get():
            raise ShapeFound(self)
        parsed, unknown = self.parse_known_args(with_underscores(args))
        if not unknown:
            return parsed
        if not unknown[0].startswith("-"):
            raise InputError(f"unexpected argument {shown(unknown[0])}; see {self.prog} --help")
        flag = shortened(unknown[0].split("=")[0], MOST_SHOWN)
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        said = hint(flag, known)
        raise InputError(f"unknown flag {flag}{said if '; known: ' not in said else f'; see {self.prog} --help'}")

    def error(self, message: str) -> NoReturn:
        """Raise :class:`InputError` with the message of argparse's error."""
        raise InputError(message)


def run_action(words: Sequence[str], overview: str, actions: Mapping[str, Callable[[list[str]], int]]) -> int:
    """Run the action named by the first word; the other words are its arguments. Without words, print the overview.

    Returns:
        The exit status: that of the action; 0 for ``--help``; 2 without words.

    Raises:
        InputError: the action is unknown, or the action raises it.
    """
    if _collecting.get():
        shapes = {name: shape_of(action) for name, action in actions.items()}
        raise ShapeFound({name: shape for name, shape in shapes.items() if isinstance(shape, Parser)})
    if not words or words[0] in {"-h", "--help"}:
        print(overview, end="")
        return 0 if words else 2
    if words[0] not in actions:
        raise InputError(f"unknown action {words[0]!r}{nearest(words[0], actions)}")
    return actions[words[0]](list(words[1:]))


def path_argument(text: str) -> str:
    """The argparse type of a path: ``~`` is replaced by the home folder, also in ``--flag=~``."""
    try:
        return user_path(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def with_underscores(words: Iterable[str]) -> list[str]:
    """The arguments with ``-`` replaced by ``_`` in the names of flags; values are unchanged."""
    result = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            word = f"--{name.replace('-', '_')}{equals}{value}"
        result.append(word)
    return result


def add_json(parser: argparse._ActionsContainer, help: str = "print one JSON object") -> None:
    """Add the flag ``--json``."""
    parser.add_argument("--json", action="store_true", help=help)


def add_source(parser: argparse._ActionsContainer, note: str = "", *, hf: bool = False) -> None:
    """Add the flags ``--preset``, ``--config_file`` and, if wanted, ``--hf``; ``note`` ends the help of ``--preset``."""
    parser.add_argument(
        "--preset", metavar="NAME", help=f"a named configuration, see `scalegpt presets`{note and f'; {note}'}"
    )
    parser.add_argument(
        "--config_file", type=path_argument, metavar="FILE", help="a JSON or YAML file of the same form as a preset"
    )
    if hf:
        parser.add_argument(
            "--hf", type=path_argument, metavar="PATH", help="a folder with a Hugging Face model, or its config.json"
        )


def add_settings(
    parser: argparse.ArgumentParser,
    title: str,
    section: type[Section],
    names: Collection[str] | None = None,
    defaults: Mapping[str, str] | None = None,
) -> None:
    """Add a flag for every setting of a configuration section, or only for the settings in ``names``.

    ``defaults`` has the defaults that the help shows for settings whose default differs from the section's.

    A flag that is not given is absent from the parsed arguments. Values stay text: the section converts and checks
    them, with the same messages as for a file.
    """
    group = parser.add_argument_group(title)
    for name, field in section.settings().items():
        if names is not None and name not in names:
            continue
        usual = AUTO if name in PLANNED_BY_DEFAULT else "none" if field.default is None else str(field.default).lower()
        default = (defaults or {}).get(name, usual)
        words = field.metadata["help"].replace("%", "%%")
        bounds = f" ({limits(field)})" if limits(field) else ""
        is_switch = bool in field_types(field)
        words_of = [*(("true", "false") if is_switch else ()), *field.metadata["choices"]]
        choices = "|".join([*words_of, *([AUTO] if words_of and name in PLANNED and AUTO not in words_of else ())])
        takes_bare = is_switch or name == "compile"
        group.add_argument(
            f"--{name}",
            default=argparse.SUPPRESS,
            help=f"{words}{bounds} [{default}]",
            metavar=choices or _metavar(field),
            nargs="?" if takes_bare else "+" if field.metadata["as_text"] else None,
            const="on" if takes_bare else None,
        )


def _metavar(field: "dataclasses.Field[Any]") -> str:
    """The placeholder for a setting's value in ``--help``."""
    return "PATH" if field.metadata["is_path"] else "N" if int in field_types(field) else "X"


def add_run_settings(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting of a run."""
    for title, section in RUN_SECTIONS.items():
        add_settings(parser, title, section)


def given_settings(arguments: argparse.Namespace, *sections: type[Section]) -> dict[str, Any]:
    """Setting → value, for the settings of ``sections`` (by default those of a run) that are on the command line."""
    names = {field.name for section in sections or RUN_SECTIONS.values() for field in dataclasses.fields(section)}
    return {name: value for name, value in vars(arguments).items() if name in names}
