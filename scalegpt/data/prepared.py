"""Find the prepared tokens that an input names, at a path or an address."""

from pathlib import Path

from scalegpt.data.remote.download import local_path
from scalegpt.data.text.documents import is_prepared
from scalegpt.data.token_file import Progress
from scalegpt.inputs import paths_of


def prepared_at(text: str, progress: Progress | None = None) -> Path | None:
    """The path of the prepared tokens that an input names; None if it is text.

    Args:
        text: one corpus (:func:`scalegpt.inputs.paths_of`), at paths or addresses.
        progress: as for :func:`~scalegpt.data.remote.download.local_path`.

    Raises:
        InputError: an address cannot be read.
    """
    paths = paths_of(text)
    path = local_path(paths[0], progress) if len(paths) == 1 else None
    return path if path is not None and is_prepared(path) else None
