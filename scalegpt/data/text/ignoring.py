"""Which entries of a folder are read: by the user's patterns and the folder's .gitignore files, all in git's syntax."""

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

from scalegpt.config import DataConfig
from scalegpt.errors import InputError
from scalegpt.storage import read_bytes
from scalegpt.text import one_line

GITIGNORE = ".gitignore"
EXCLUDED, NOT_INCLUDED, IGNORED = "excluded", "not included", "ignored by .gitignore"
"""The reasons for skipping a file or a folder."""

_ABOVE = "ps_d"
"""The group of pathspec's regular expressions that matches where a pattern matches a folder above a path, not the path."""


class _Pattern(NamedTuple):
    """A pattern of a .gitignore file.

    Attributes:
        regex: matches paths, or what begins with a folder that the pattern names.
        ignores: what a match means: the path is ignored, or, with ``!`` before the pattern, it is not.
        only_folders: whether files are not meant, as a slash at the pattern's end says.
    """

    regex: "re.Pattern[str]"
    ignores: bool
    only_folders: bool

    def matches(self, path: str, *, is_folder: bool) -> bool:
        if self.only_folders and not is_folder:
            return False
        found = self.regex.search(path)
        return found is not None and not found.groupdict().get(_ABOVE)


_Patterns = tuple[_Pattern, ...]


def _last_match(patterns: _Patterns, path: str, *, is_folder: bool) -> bool | None:
    """What the last pattern says that matches a path itself; None if none does."""
    found = (each.ignores for each in reversed(patterns) if each.matches(path, is_folder=is_folder))
    return next(found, None)


@dataclass(frozen=True)
class Rules:
    """The .gitignore files that hold in a folder.

    Attributes:
        levels: for each file the path of its folder, empty or with a slash at its end, and its patterns; the deepest is last.
    """

    levels: tuple[tuple[str, _Patterns], ...] = ()

    def below(self, file: Path, prefix: str) -> "Rules":
        """The rules in a folder with a .gitignore file of its own.

        Args:
            file: the .gitignore file.
            prefix: path of its folder inside the folder that the user named, empty or with a slash at its end.

        Raises:
            InputError: the file cannot be read.
        """
        try:
            text = read_bytes(file).decode("utf-8-sig", "surrogateescape")
        except OSError as error:
            what = f"{one_line(file)} cannot be read: {error.strerror}"
            raise InputError(f"{what}; make it readable, or give --gitignore false") from None
        lines = (line.removesuffix("\r") for line in text.split("\n"))
        return Rules((*self.levels, (prefix, tuple(each for line in lines for each in _parsed(line) or ()))))

    def ignore(self, path: str, *, is_folder: bool) -> bool:
        """Whether a path inside the folder that the user named is ignored, if no folder above it is.

        As git does it: the last pattern that matches decides, and a deeper file precedes those above it.
        """
        for prefix, patterns in reversed(self.levels):
            found = _last_match(patterns, path.removeprefix(prefix), is_folder=is_folder)
            if found is not None:
                return found
        return False


@dataclass(frozen=True)
class Selection:
    """Which files inside the folders that the user names are read.

    Attributes:
        include: patterns with commas between them; files that match none of them, nor a folder above, are skipped. None: all
            files are read.
        exclude: patterns with commas between them; files and folders that match one of them are skipped.
        gitignore: whether to honour the .gitignore files in the folders.
        follow_links: whether to follow symbolic links to targets outside the folders.

    Raises:
        InputError: a pattern is not valid.
    """

    include: str | None = None
    exclude: str | None = None
    gitignore: bool = True
    follow_links: bool = False
    _included: _Patterns = field(init=False, repr=False)
    _excluded: _Patterns = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_included", _of_setting("include", self.include))
        object.__setattr__(self, "_excluded", _of_setting("exclude", self.exclude))

    @classmethod
    def of(cls, settings: DataConfig) -> "Selection":
        """The selection that the data settings describe."""
        return cls(settings.include, settings.exclude, gitignore=settings.gitignore, follow_links=settings.follow_links)

    def why_not(self, path: str, rules: Rules, *, is_folder: bool) -> str | None:
        """Why a path inside the folder that the user named is skipped, if no folder above it is; None if it is not.

        Args:
            path: the path.
            rules: the .gitignore files that hold in its folder.
            is_folder: whether it is a folder.
        """
        if _last_match(self._excluded, path, is_folder=is_folder):
            return EXCLUDED
        if rules.ignore(path, is_folder=is_folder):
            return IGNORED
        return NOT_INCLUDED if self.include is not None and not is_folder and not self._includes(path) else None

    def _includes(self, path: str) -> bool:
        """Whether ``include`` has a file: what it says of the file itself, else of the nearest folder above."""
        found = _last_match(self._included, path, is_folder=False)
        for folder in PurePosixPath(path).parents:
            if found is not None:
                break
            found = _last_match(self._included, str(folder), is_folder=True)
        return bool(found)


def _of_setting(setting: str, text: str | None) -> _Patterns:
    found: list[_Pattern] = []
    for pattern in (part.strip() for part in (text or "").split(",")):
        parsed = _parsed(pattern)
        if parsed is None:
            raise InputError(
                f"{setting}: {one_line(pattern)} is not a pattern of .gitignore files, such as *.py or docs/"
            )
        found += parsed
    return tuple(found)


def _parsed(line: str) -> list[_Pattern] | None:
    """The pattern of a line of a .gitignore file; empty for a blank line or a comment; None for what git passes over."""
    text = line.rstrip(" ")
    only_folders = text.endswith("/")
    try:
        pattern = GitIgnoreSpecPattern(text[:-1] if only_folders else line)
    except (ValueError, re.error):
        return None
    if pattern.include is None or pattern.regex is None:
        return []
    return [_Pattern(pattern.regex, pattern.include, only_folders)]
