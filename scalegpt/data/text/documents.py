"""Find the files that inputs name or hold."""

import heapq
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scalegpt.data.text.ours import RUN, folder_of_ours
from scalegpt.errors import InputError
from scalegpt.text import one_line

LEAVES = "link out of the folder"
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
"""What to say of a folder of each kind that the user names as input."""

_SPECIAL = {
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


@dataclass(frozen=True)
class Document:
    """A file to read.

    Attributes:
        path: where it is.
        name: how it is called whatever folder it lies in: its path inside the folder that the user named.
        real: where it is with all links followed, which tells two paths to one file.
        folder: the folder that the user named, or None for a file that the user named.

    """

    path: Path
    name: str
    real: Path
    folder: Path | None = None


@dataclass
class Skipped:
    """What is not read of the folders given.

    Attributes:
        counts: reason → number of files, folders or links.
        examples: reason → one of them.

    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one more."""
        self.counts[reason] += 1
        self.examples.setdefault(reason, name)

    def __str__(self) -> str:
        """As in ``3 binary (such as a.png), 1 empty (b.txt)``; empty where nothing was skipped."""
        return ", ".join(
            f"{count} {reason} ({'such as ' if count > 1 else ''}{one_line(self.examples[reason])})"
            for reason, count in sorted(self.counts.items())
        )


@dataclass
class Found:
    """What the inputs name and hold.

    Attributes:
        documents: sorted by name, none twice.
        skipped: what is no file that could be read: pipes, broken links, folders of tokens, links out of the folder.

    """

    documents: list[Document]
    skipped: Skipped


def find_documents(inputs: Sequence[str | Path], *, follow_links: bool = False) -> Found:
    """List the files that the inputs name or hold.

    Folders are searched to any depth. Hidden files and folders are skipped, and folders that hold tokens, a saved data set, a
    run or a checkpoint.
    A symbolic link inside a folder never adds a file twice; one that leaves the folder is followed only on request.

    Args:
        inputs: files and folders.
        follow_links: follow links that leave a folder.

    Raises:
        InputError: no input; one that does not exist, or that is a folder of tokens or a saved data set.

    """
    if not inputs:
        raise InputError("no input was given; name text files or folders of them")
    skipped = Skipped()
    found: dict[Path, Document] = {}
    links: list[tuple[Path, str]] = []
    folders: list[Path] = []
    for given in map(Path, inputs):
        check_exists(given)
        if is_folder(given):
            search = _Search(given, skipped, follow_links=follow_links)
            for real, path in search.run().items():
                found.setdefault(real, Document(path, path.relative_to(given).as_posix(), real, given))
            links += [(target, path.relative_to(given).as_posix()) for target, path in search.leaving]
            folders.append(search.root)
        else:
            # A named file is held to more than one that lies in a folder: the name wins.
            found[real_path(given)] = Document(given, given.name, real_path(given))
    for target, name in links:
        if target not in found and not any(target.is_relative_to(folder) for folder in folders):
            skipped.add(LEAVES, name)
    documents = sorted(found.values(), key=lambda document: (document.name, str(document.path)))
    return Found(documents, skipped)


class _Search:
    """The files of one folder.

    Attributes:
        root: the folder, with all links followed.
        leaving: links that leave the folder and were not followed: target and path.

    """

    def __init__(self, folder: Path, skipped: Skipped, *, follow_links: bool) -> None:
        self.folder, self.root = folder, real_path(folder)
        self.leaving: list[tuple[Path, Path]] = []
        self._skipped, self._follows = skipped, follow_links
        self._files: dict[Path, Path] = {}
        self._links: list[Path] = []
        self._seen: set[Path] = set()

    def run(self) -> dict[Path, Path]:
        """Return the files: the real path and the path to open. A file goes before any link to it."""
        self._walk(self.folder)
        heapq.heapify(self._links)
        while self._links:
            self._follow(heapq.heappop(self._links))
        return self._files

    def _walk(self, top: Path) -> None:
        pending = [(top, real_path(top))]
        while pending:
            folder, real = pending.pop()
            if real in self._seen:  # a link back to where we have been
                continue
            self._seen.add(real)
            try:
                entries = list(os.scandir(folder))
            except OSError as error:
                self._refuse_unreadable(folder, error)
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
        except OSError:  # removed meanwhile, or not ours to see
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
            is_there = isinstance(error, PermissionError)
            self._skip("unreadable" if is_there else "broken link", link)
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

    def _refuse_unreadable(self, folder: Path, error: OSError) -> None:
        """Count a folder that cannot be listed; the one that the user named is refused."""
        if folder == self.folder:
            raise InputError(f"input {one_line(folder)} cannot be read: {error.strerror}; make it readable") from None
        self._skip("unreadable", folder)


def folder_kind(names: set[str], folder: Path) -> str | None:
    """Name what a folder is that holds no text of its own, from the names in it; None for an ordinary folder."""
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
    """Say whether a folder holds token files, ours or nanoGPT's."""
    try:
        return stat.S_ISREG((folder / "train.bin").stat().st_mode)
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Say whether a path leads to a folder; a broken or circular link and a place that cannot be seen do not."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def real_path(path: Path) -> Path:
    """Return a path with all links followed, as far as they lead anywhere."""
    return Path(os.path.realpath(path))


def check_exists(path: Path) -> None:
    """Refuse an input that is not there.

    Raises:
        InputError: it does not exist, or cannot be looked at.

    """
    try:
        path.stat()
    except FileNotFoundError:
        raise InputError(f"input {one_line(path)} does not exist; name a text file or a folder of them") from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"input {one_line(path)} cannot be read: {getattr(error, 'strerror', error)}; name a text file"
        ) from None
