"""Makes a folder that appears complete or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scalegpt.data.leftovers import make_unfinished, remove_abandoned
from scalegpt.errors import InputError
from scalegpt.storage import disk_errors, sync_folder

_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Make a hidden folder to write into. It becomes ``out`` when the block ends, and is removed if the block raises.

    Raises:
        InputError: ``out`` exists and is not an empty folder, or cannot be written, or the disk is full.
    """
    out = out.absolute()
    check_free(out)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(out)
        folder, lock = make_unfinished(out)
        try:
            yield folder
            sync_folder(folder)
            try:
                folder.rename(out)
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                raise _exists(out) from None
            sync_folder(out.parent)
        finally:
            os.close(lock)
            shutil.rmtree(folder, ignore_errors=True)


def check_free(out: Path) -> None:
    """Refuse a path that exists, unless it is an empty folder.

    Raises:
        InputError: the path exists.
    """
    with disk_errors(out):
        if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
            raise _exists(out)


def _exists(out: Path) -> InputError:
    return InputError(f"{out} exists already; choose another --out")
