"""Find the files that inputs name or hold."""

import heapq
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from scalegpt.data.text.ours import RUN, folder_of_ours
from scalegpt.errors import InputError
from scalegpt.text import one_line

OUTSIDE_LINK = "link out of the folder"
"""Why a symbolic link is skipped whose target lies outside the folder that the user named."""

TOKENS, SAVED = "folder of prepared tokens", "saved data set"

_REFUSED = {
    RUN: "is the folder of a run, which holds no text to train on; name the text itself",
    TOKENS: "holds tokens already prepared; give it alone as --input_file, or name text files",
    SAVED: (
        "is a data set saved by Hugging Face datasets, in Arrow files; write its text column to .txt files, one a document, "
        "and name their folder"
    ),
}
"""Kind of folder → why it is refused where the user names it as input."""

_SPECIAL = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}


@dataclass(frozen=True)
class Document:
    """A file to read.

    Attributes:
        path: its path.
        name: its path inside the folder that the user named.
        real: its path with all links followed, by which two paths to one file are recognised.
        folder: the folder that the user named; None for a file that the user named.
    """

    path: Path
    name: str
    real: Path
    folder: Path | None = None


@dataclass
class Tally:
    """Files, folders or links, counted by reason, with an example of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one more."""
        self.counts[reason] += 1
        self.examples.setdefault(reason, name)

    def __str__(self) -> str:
        """As in ``3 binary (such as a.png), 1 empty (b.txt)``."""
        return ", ".join(
            f"{count} {reason} ({'such as ' if count > 1 else ''}{one_line(self.examples[reason])})"
            for reason, count in sorted(self.counts.items())
        )


class FoundDocuments(NamedTuple):
    """The documents of the inputs, sorted by name and none twice, and what was skipped of the folders."""

    documents: list[Document]
    skipped: Tally


def find_documents(inputs: Sequence[str | Path], *, follow_links: bool = False) -> FoundDocuments:
    """List the files that the inputs name or hold.

    Folders are searched to any depth. Hidden files and folders are skipped, and folders of tokens, saved data sets, runs and
    checkpoints. A symbolic link inside a folder never adds a file twice; one that leaves the folder is followed only on
    request.

    Raises:
        InputError: no input; one that does not exist; or a folder of tokens, of a run, or of a saved data set.
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
            search = _FolderSearch(given, skipped, follow_links=follow_links)
            for real, path in search.run().items():
                found.setdefault(real, Document(path, path.relative_to(given).as_posix(), real, given))
            links += [(target, path.relative_to(given).as_posix()) for target, path in search.leaving]
            folders.append(search.root)
        else:
            # A file that is named must be usable, one in a folder may be skipped: the named one counts.
            found[real_path(given)] = Document(given, given.name, real_path(given))
    for target, name in links:
        if target not in found and not any(target.is_relative_to(folder) for folder in folders):
            skipped.add(OUTSIDE_LINK, name)
    documents = sorted(found.values(), key=lambda document: (document.name, str(document.path)))
    return FoundDocuments(documents, skipped)


class _FolderSearch:
    """The files of one folder.

    Attributes:
        root: the folder, with all links followed.
        leaving: links that leave the folder and were not followed: target and path.
    """

    def __init__(self, folder: Path, skipped: Tally, *, follow_links: bool) -> None:
        self.folder, self.root = folder, real_path(folder)
        self.leaving: list[tuple[Path, Path]] = []
        self._skipped, self._follows = skipped, follow_links
        self._files: dict[Path, Path] = {}
        self._links: list[Path] = []
        self._seen: set[Path] = set()

    def run(self) -> dict[Path, Path]:
        """The files: real path → path to open. A file is preferred to any link to it."""
        self._walk(self.folder)
        heapq.heapify(self._links)
        while self._links:
            self._follow(heapq.heappop(self._links))
        return self._files

    def _walk(self, top: Path) -> None:
        pending = [(top, real_path(top))]
        while pending:
            folder, real = pending.pop()
            if real in self._seen:  # a link back to a folder above
                continue
            self._seen.add(real)
            try:
                entries = list(os.scandir(folder))
            except OSError as error:
                if folder == self.folder:
                    raise InputError(
                        f"input {one_line(folder)} cannot be read: {error.strerror}; make it readable"
                    ) from None
                self._skip("unreadable", folder)
                continue
            kind = folder_kind({entry.name for entry in entries}, folder)
            if kind is not None:
                if folder == self.folder:
                    raise InputError(f"{one_line(folder)} {_REFUSED[kind]}")
                self._skip(kind, folder)
                continue
            for entry in entries:
                if not entry.name.startswith("."):
                    self._take(folder / entry.name, real / entry.name, pending)

    def _take(self, path: Path, real: Path, pending: list[tuple[Path, Path]]) -> None:
        try:
            mode = path.lstat().st_mode
        except OSError:  # removed meanwhile, or closed to us
            self._skip("unreadable", path)
            return
        if stat.S_ISLNK(mode):
            heapq.heappush(self._links, path)
        elif stat.S_ISDIR(mode):
            pending.append((path, real))
        elif stat.S_ISREG(mode):
            self._files.setdefault(real, path)
        else:
            self._skip(_SPECIAL.get(stat.S_IFMT(mode), "special file"), path)

    def _follow(self, link: Path) -> None:
        target = real_path(link)
        if target in self._files or target in self._seen:
            return
        try:
            mode = link.stat().st_mode
        except OSError as error:
            self._skip("unreadable" if isinstance(error, PermissionError) else "broken link", link)
            return
        if not self._follows and not target.is_relative_to(self.root):
            self.leaving.append((target, link))
        elif stat.S_ISDIR(mode):
            self._walk(link)
        elif stat.S_ISREG(mode):
            self._files[target] = link
        else:
            self._skip(_SPECIAL.get(stat.S_IFMT(mode), "special file"), link)

    def _skip(self, reason: str, path: Path) -> None:
        self._skipped.add(reason, path.relative_to(self.folder).as_posix())


def folder_kind(names: set[str], folder: Path) -> str | None:
    """The kind of a folder that holds no text of its own, from the names in it; None for an ordinary folder."""
    ours = folder_of_ours(names)
    if ours is not None:
        return ours
    if "train.bin" in names and is_prepared(folder):
        return TOKENS
    is_saved = "dataset_dict.json" in names or (
        "dataset_info.json" in names and ("state.json" in names or any(name.endswith(".arrow") for name in names))
    )
    return SAVED if is_saved else None


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds token files, ours or nanoGPT's."""
    return _has_mode(folder / "train.bin", stat.S_IFREG)


def is_folder(path: Path) -> bool:
    """Whether a path leads to a folder; false for a broken or circular link and a place that cannot be looked at."""
    return _has_mode(path, stat.S_IFDIR)


def _has_mode(path: Path, kind: int) -> bool:
    try:
        return stat.S_IFMT(path.stat().st_mode) == kind
    except (OSError, ValueError):
        return False


def real_path(path: Path) -> Path:
    """The path with all links followed, as far as they lead anywhere."""
    return Path(os.path.realpath(path))


def _check_exists(path: Path) -> None:
    """Refuse an input that is missing or cannot be looked at."""
    try:
        path.stat()
    except FileNotFoundError:
        raise InputError(f"input {one_line(path)} does not exist; name a text file or a folder of them") from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"input {one_line(path)} cannot be read: {getattr(error, 'strerror', error)}; name a text file"
        ) from None
