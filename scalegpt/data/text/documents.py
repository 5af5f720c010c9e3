"""Find the files to read: files that the user names, and files inside folders that the user names."""

import heapq
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from scalegpt.data.foreign.table import recognise
from scalegpt.data.sidecar import FIRST_FILES
from scalegpt.data.text.ignoring import GITIGNORE, Rules, Selection
from scalegpt.data.text.ours import RUN, folder_of_ours
from scalegpt.data.text.records.saved import is_cache, is_saved, parts_of
from scalegpt.errors import InputError
from scalegpt.text import one_line

_ALL = Selection()

OUTSIDE_LINK = "link out of the folder"
"""The reason for skipping a symbolic link whose target is outside the folder that the user named."""

TOKENS, CACHE, OTHER_SPLIT = "folder of prepared tokens", "cache of datasets", "other split of a saved data set"

_REFUSED = {
    RUN: "is the folder of a run, which holds no text to train on; name the text itself",
    TOKENS: (
        "holds tokens already prepared; give it alone to the trainer as --input_file, or give each input a weight there "
        "(a=0.7 b=0.3), or name text files"
    ),
    CACHE: (
        "is part of the cache of Hugging Face datasets; load the data set there, save it with save_to_disk, and name the "
        "folder that this makes"
    ),
}
"""Kind of folder → why it is refused if the user names it as input."""

_TOKEN_SUFFIXES = (".bin", ".ds")
"""A folder of token files has a file with one of these suffixes."""

_SPECIAL = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}


@dataclass(frozen=True)
class Document:
    """A file to read.

    Attributes:
        path: path of the file.
        name: path of the file inside the folder that the user named; the file's name if the user named the file.
        real: path of the file with all links resolved; it is the same for all paths to one file.
        folder: the folder that the user named; None if the user named the file.
    """

    path: Path
    name: str
    real: Path
    folder: Path | None = None


@dataclass
class Tally:
    """Counts of files, folders, links or records by reason, with an example for each reason."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count the file, folder or link ``name`` under a reason, or ``count`` records of the file."""
        if count:
            self.counts[reason] += count
            self.examples.setdefault(reason, name)

    def __str__(self) -> str:
        """The counts as text, such as ``3 binary (such as a.png), 1 empty (b.txt)``."""
        return ", ".join(
            f"{count} {reason} ({'such as ' if count > 1 else ''}{one_line(self.examples[reason])})"
            for reason, count in sorted(self.counts.items())
        )


class FoundDocuments(NamedTuple):
    """The documents of the inputs, sorted by name and without duplicates, and the tally of what was skipped."""

    documents: list[Document]
    skipped: Tally


def find_documents(inputs: Sequence[str | Path], selection: Selection = _ALL) -> FoundDocuments:
    """List the files that the user names, and the files inside folders that the user names.

    Folders are searched to any depth. Hidden files and folders are skipped, and so are folders of tokens, runs, checkpoints,
    caches of Hugging Face datasets, and all splits but one of the data sets that it saved. ``selection`` says which other
    files are skipped, and whether a symbolic link to a target outside the named folder is followed. A link never adds a file
    twice.

    Raises:
        InputError: there is no input; an input does not exist or cannot be read; or an input is a folder of prepared tokens,
            of a run, or of a cache; a saved data set or a .gitignore file cannot be read.
    """
    if not inputs:
        raise InputError("no input was given; name text files or folders of them")
    skipped = Tally()
    found: dict[Path, Document] = {}
    links: list[tuple[Path, str]] = []
    folders: list[Path] = []
    for given in map(Path, inputs):
        _check_exists(given)
        if is_folder(given):
            search = _FolderSearch(given, skipped, selection)
            for real, path in search.run().items():
                found.setdefault(real, Document(path, path.relative_to(given).as_posix(), real, given))
            links += [(target, path.relative_to(given).as_posix()) for target, path in search.leaving]
            folders.append(search.root)
        else:
            # A file that is named and also inside a named folder counts as named: unlike files of folders, it must be usable.
            found[real_path(given)] = Document(given, given.name, real_path(given))
    for target, name in links:
        if target not in found and not any(target.is_relative_to(folder) for folder in folders):
            skipped.add(OUTSIDE_LINK, name)
    documents = sorted(found.values(), key=lambda document: (document.name, str(document.path)))
    return FoundDocuments(documents, skipped)


class _FolderSearch:
    """The search for the files of one folder.

    Attributes:
        root: path of the folder with all links resolved.
        leaving: target and path of each link that was not followed because its target is outside the folder.
    """

    def __init__(self, folder: Path, skipped: Tally, selection: Selection) -> None:
        self.folder, self.root = folder, real_path(folder)
        self.leaving: list[tuple[Path, Path]] = []
        self._skipped, self._selection = skipped, selection
        self._files: dict[Path, Path] = {}
        self._links: list[tuple[Path, Rules]] = []
        self._seen: set[Path] = set()

    def run(self) -> dict[Path, Path]:
        """Search the folder; returns each file's real path → the path to open it by, its own rather than a link's."""
        self._walk(self.folder, Rules())
        while self._links:
            self._follow(*heapq.heappop(self._links))
        return self._files

    def _walk(self, top: Path, rules: Rules) -> None:
        pending = [(top, real_path(top), rules)]
        while pending:
            folder, real, rules = pending.pop()
            if real in self._seen:  # a link back to a folder above
                continue
            self._seen.add(real)
            try:
                names = os.listdir(folder)  # noqa: PTH208
            except OSError as error:
                if folder == self.folder:
                    raise InputError(
                        f"input {one_line(folder)} cannot be read: {error.strerror}; make it readable"
                    ) from None
                self._skip("unreadable", folder)
                continue
            kind = folder_kind(set(names), folder)
            if kind is not None:
                if folder == self.folder:
                    raise InputError(f"{one_line(folder)} {_REFUSED[kind]}")
                self._skip(kind, folder)
                continue
            if GITIGNORE in names and self._selection.gitignore:
                prefix = "" if folder == self.folder else f"{self._inside(folder)}/"
                rules = rules.below(folder / GITIGNORE, prefix)
            for name in self._visible(folder, names):
                self._take(folder / name, real / name, rules, pending)

    def _visible(self, folder: Path, names: list[str]) -> list[str]:
        """The entries of a folder to look at: all but hidden ones; of a saved data set the files of its records."""
        if not is_saved(set(names)):
            return [name for name in names if not name.startswith(".")]
        chosen, others = parts_of(folder, set(names))
        for name in others:
            self._skip(OTHER_SPLIT, folder / name)
        return chosen

    def _inside(self, path: Path) -> str:
        """The path inside the folder that the user named."""
        return path.relative_to(self.folder).as_posix()

    def _take(self, path: Path, real: Path, rules: Rules, pending: list[tuple[Path, Path, Rules]]) -> None:
        try:
            mode = path.lstat().st_mode
        except OSError:  # removed meanwhile, or not accessible
            self._skip("unreadable", path)
            return
        why_not = self._selection.why_not(self._inside(path), rules, is_folder=stat.S_ISDIR(mode))
        if why_not is not None:
            self._skip(why_not, path)
        elif stat.S_ISLNK(mode):
            heapq.heappush(self._links, (path, rules))
        elif stat.S_ISDIR(mode):
            pending.append((path, real, rules))
        elif stat.S_ISREG(mode):
            self._files.setdefault(real, path)
        else:
            self._skip(_SPECIAL.get(stat.S_IFMT(mode), "special file"), path)

    def _follow(self, link: Path, rules: Rules) -> None:
        target = real_path(link)
        if target in self._files or target in self._seen:
            return
        try:
            mode = link.stat().st_mode
        except OSError as error:
            self._skip("unreadable" if isinstance(error, PermissionError) else "broken link", link)
            return
        if not self._selection.follow_links and not target.is_relative_to(self.root):
            self.leaving.append((target, link))
        elif stat.S_ISDIR(mode):
            self._walk(link, rules)
        elif stat.S_ISREG(mode):
            self._files[target] = link
        else:
            self._skip(_SPECIAL.get(stat.S_IFMT(mode), "special file"), link)

    def _skip(self, reason: str, path: Path) -> None:
        self._skipped.add(reason, self._inside(path))


def folder_kind(names: set[str], folder: Path) -> str | None:
    """What a folder is, if the names of its entries say that it is no text to train on: a run, tokens, …; else None."""
    ours = folder_of_ours(names)
    if ours is not None:
        return ours
    if any(name.endswith(_TOKEN_SUFFIXES) for name in names) and is_prepared(folder):
        return TOKENS
    return CACHE if is_cache(names) else None


def is_prepared(folder: Path) -> bool:
    """Whether a path is a folder of token files that ScaleGPT or nanoGPT prepared, or holds those of another program."""
    return any(_has_mode(folder / name, stat.S_IFREG) for name in FIRST_FILES) or recognise(folder) is not None


def is_folder(path: Path) -> bool:
    """Whether a path is a folder or a link to one; False for a broken or circular link, or without access to the path."""
    return _has_mode(path, stat.S_IFDIR)


def _has_mode(path: Path, kind: int) -> bool:
    try:
        return stat.S_IFMT(path.stat().st_mode) == kind
    except (OSError, ValueError):
        return False


def real_path(path: Path) -> Path:
    """The path with all links resolved, as far as their targets exist."""
    return Path(os.path.realpath(path))


def _check_exists(path: Path) -> None:
    """Refuse an input that does not exist or is not accessible."""
    try:
        path.stat()
    except FileNotFoundError:
        before, equals, _ = str(path).rpartition("=")
        advice = "name a text file or a folder of them"
        if equals and os.path.exists(before):  # noqa: PTH110 - pathlib's raises where a folder is closed
            advice = (
                "weights are for --input_file of train and eval; prepare each source by itself, and give them there"
            )
        raise InputError(f"input {one_line(path)} does not exist; {advice}") from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"input {one_line(path)} cannot be read: {getattr(error, 'strerror', error)}; name a text file"
        ) from None
