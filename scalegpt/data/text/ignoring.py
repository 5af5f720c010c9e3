"""Which entries of a folder are read: by the user's patterns and the folder's .gitignore files, all in git's syntax."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pathspec import GitIgnoreSpec

from scalegpt.config import DataConfig
from scalegpt.errors import InputError
from scalegpt.storage import read_bytes
from scalegpt.text import one_line

GITIGNORE = ".gitignore"
EXCLUDED, NOT_INCLUDED, IGNORED = "excluded", "not included", "ignored by .gitignore"
"""The reasons for skipping a file or a folder."""


@dataclass(frozen=True)
class Rules:
    """The .gitignore files that hold in a folder.

    Attributes:
        levels: for each file the path of its folder, empty or with a slash at its end, and its patterns; the deepest is last.
    """

    levels: tuple[tuple[str, GitIgnoreSpec], ...] = ()

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
        lines = [line.removesuffix("\r") for line in text.split("\n")]
        return Rules((*self.levels, (prefix, _spec(line for line in lines if _is_valid(line)))))

    def ignore(self, path: str) -> bool:
        """Whether a path inside the folder that the user named is ignored; a folder's ends with a slash.

        As git does it: the last pattern that matches decides, and a deeper file precedes those above it.
        """
        for prefix, spec in reversed(self.levels):
            found = spec.check_file(path.removeprefix(prefix)).include
            if found is not None:
                return found
        return False


@dataclass(frozen=True)
class Selection:
    """Which files inside the folders that the user names are read.

    Attributes:
        include: patterns with commas between them; files that match none of them are skipped. None: all files.
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
    _included: GitIgnoreSpec | None = field(init=False, repr=False)
    _excluded: GitIgnoreSpec = field(init=False, repr=False)

    def __post_init__(self) -> None:
        included = None if self.include is None else _spec(_patterns("include", self.include))
        object.__setattr__(self, "_included", included)
        object.__setattr__(self, "_excluded", _spec(_patterns("exclude", self.exclude or "")))

    @classmethod
    def of(cls, settings: DataConfig) -> "Selection":
        """The selection that the data settings describe."""
        return cls(settings.include, settings.exclude, gitignore=settings.gitignore, follow_links=settings.follow_links)

    def why_not(self, path: str, rules: Rules) -> str | None:
        """Why a path inside the folder that the user named is skipped; None if it is not.

        Args:
            path: the path; a folder's ends with a slash.
            rules: the .gitignore files that hold in its folder.
        """
        if self._excluded.check_file(path).include:
            return EXCLUDED
        if rules.ignore(path):
            return IGNORED
        if self._included is not None and not path.endswith("/") and not self._included.check_file(path).include:
            return NOT_INCLUDED
        return None


def _patterns(setting: str, text: str) -> list[str]:
    patterns = [part.strip() for part in text.split(",") if part.strip()]
    for pattern in patterns:
        if not _is_valid(pattern):
            raise InputError(
                f"{setting}: {one_line(pattern)} is not a pattern of .gitignore files, such as *.py or docs/"
            )
    return patterns


def _is_valid(pattern: str) -> bool:
    """Whether a pattern can match at all: git passes over others."""
    try:
        _spec([pattern])
    except (ValueError, re.error):
        return False
    return True


def _spec(patterns: Iterable[str]) -> GitIgnoreSpec:
    return GitIgnoreSpec.from_lines(patterns)
