"""The settings of an original model that an export copies: the longest context, and how text is generated.

They are stored as ``origin.json`` in the run's folder, since the Hugging Face folder may be gone when the run is
exported.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from scalegpt.checkpoint.address import Address, Place
from scalegpt.checkpoint.reader import read_limited
from scalegpt.checkpoint.store import RUN_COPY
from scalegpt.errors import InputError
from scalegpt.interop.families import HfModel
from scalegpt.structured import CONFIG_LIMIT, object_in, read_object

ORIGIN, GENERATION = "origin.json", "generation_config.json"

_ID = "_token_id"
_OF_TOKENS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias")
"""Settings of a generation configuration that name tokens by their ids."""

_ABOUT_TRANSFORMERS = ("transformers_version", "_from_model_config")


@dataclass(frozen=True)
class TakenOver:
    """The settings of the Hugging Face folder from which a model came.

    Attributes:
        positions: the longest context of the original model, in tokens; 0: not known.
        tokenizer: the :attr:`~scalegpt.data.tokenizers.base.Tokenizer.text_digest` of the folder's tokenizer, to which the
            ids belong; None: not known.
        ids: the ids of the tokens that begin, end and pad a text, under their keys in ``config.json``; None: there is none.
        generation: the content of the folder's ``generation_config.json``.
    """

    positions: int = 0
    tokenizer: str | None = None
    ids: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, read: HfModel, tokenizer: str | None) -> "TakenOver":
        """Read the settings of a folder. ``tokenizer`` is the text digest of its tokenizer.

        Raises:
            InputError: ``generation_config.json`` cannot be read.
        """
        eos = read.eos[0] if len(read.eos) == 1 else list(read.eos) or None
        ids = {"bos_token_id": read.bos, "eos_token_id": eos, "pad_token_id": read.pad}
        path = read.path.with_name(GENERATION)
        generation = _object(path) if path.exists() else {}
        kept = {key: value for key, value in generation.items() if key not in _ABOUT_TRANSFORMERS}
        return cls(min(read.positions, read.window or read.positions), tokenizer, ids, kept)

    @classmethod
    def beside(cls, checkpoint: Place) -> "TakenOver":
        """Read the settings that are stored in the run's folder of a checkpoint, or in the copy of it beside the checkpoint.

        They are empty if the run did not begin with a Hugging Face folder.

        Raises:
            InputError: the file is damaged.
        """
        paths = [checkpoint.parent / RUN_COPY / ORIGIN, checkpoint.parent.parent / ORIGIN]
        path = next((each for each in paths if each.exists()), None)
        if path is None:
            return cls()
        values = _object(path)
        kinds = {"positions": int, "tokenizer": str | None, "ids": dict, "generation": dict}
        if values.keys() != kinds.keys() or not all(isinstance(values[key], kind) for key, kind in kinds.items()):
            raise InputError(f"{path} is damaged; restore it, or remove it to export without its settings")
        return cls(**values)

    def as_file(self) -> bytes:
        """The content of ``origin.json``."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    def special_ids(self, rows: int) -> dict[str, Any]:
        """Those of :attr:`ids` that are in a vocabulary of ``rows``, since a run may have cut off others."""
        return {key: _inside(value, rows) for key, value in self.ids.items()}

    def generation_config(self, rows: int, *, ids: bool) -> dict[str, Any]:
        """:attr:`generation`.

        If ``ids`` is true it includes the ids of tokens in a vocabulary of ``rows``, otherwise no ids.
        """
        values = {key: _inside(value, rows) if key.endswith(_ID) else value for key, value in self.generation.items()}
        return {key: value for key, value in values.items() if ids or not (key.endswith(_ID) or key in _OF_TOKENS)}


def _inside(value: Any, rows: int) -> Any:
    """An id, or the ids of a list, below ``rows``; None if none is left."""
    if isinstance(value, list):
        return [each for each in value if isinstance(each, int) and each < rows] or None
    return value if isinstance(value, int) and value < rows else None


def _object(path: Place) -> dict[str, Any]:
    try:
        return (
            object_in(read_limited(path, CONFIG_LIMIT), str(path)) if isinstance(path, Address) else read_object(path)
        )
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
