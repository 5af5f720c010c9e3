"""The model that is exported: a checkpoint's shape, weights and tokenizer, without rows that only pad the vocabulary."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from scalegpt.checkpoint.manifest import Header
from scalegpt.checkpoint.reader import Checkpoint
from scalegpt.config import ModelConfig, TrainConfig
from scalegpt.config.tokenizer import TOKENIZER_JSON, parse_tokenizer, vocabulary
from scalegpt.data.tokenizers import Tokenizer
from scalegpt.data.tokenizers.export import tokenizer_files
from scalegpt.data.tokenizers.kept import begin_named_in
from scalegpt.weights.origin import EMBEDDING, HEAD
from scalegpt.weights.taken_over import TakenOver


@dataclass(frozen=True)
class Source:
    """A trained model to be written for another program.

    Attributes:
        checkpoint: the checkpoint with the weights, whose files have been verified.
        model: the shape that is written.
        tokenizer: the tokenizer of the run.
        dtype: the dtype of the weights that are written, a key of :data:`~scalegpt.checkpoint.inspection.DTYPES`.
        taken_over: the settings of the Hugging Face folder with which the run began.
    """

    checkpoint: Checkpoint
    model: ModelConfig
    tokenizer: Tokenizer
    dtype: str = "fp32"
    taken_over: TakenOver = field(default_factory=TakenOver)

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: str = "fp32") -> "Source":
        """The model of a checkpoint.

        Training pads the vocabulary for speed. Rows beyond the tokenizer's vocabulary are left out. A model that began
        with other weights (``init_from``) keeps all its rows, since the original model has them too.

        Raises:
            InputError: the checkpoint's configuration or tokenizer, or the run's ``origin.json``, cannot be read.
        """
        model, train = checkpoint.section("model", ModelConfig), checkpoint.section("train", TrainConfig)
        tokenizer = Tokenizer.from_dict(checkpoint.manifest.header.tokenizer)
        if train.init_from is None and tokenizer.vocab_size < model.vocab_size:
            model = model.changed(vocab_size=tokenizer.vocab_size)
        return cls(checkpoint, model, tokenizer, dtype, TakenOver.beside(checkpoint.path))

    @property
    def positions(self) -> int:
        """The longest context that is written.

        With rotary positions it is the original model's, if longer than the run's block.
        """
        known = self.taken_over.positions if self.model.position == "rope" else 0
        return max(self.model.block_size, known)

    @property
    def notes(self) -> tuple[str, ...]:
        """A remark on the longest context, if it is not the run's block."""
        trained, longest = self.model.block_size, self.positions
        line = f"context of {longest:,} tokens, that of the original model; this run trained with {trained:,}"
        return (line,) if longest > trained else ()

    def special_ids(self) -> dict[str, Any]:
        """The ids of the tokens that begin, end and pad a text, under their keys in ``config.json``; None: there is none."""
        if self._keeps_tokenizer:
            return self.taken_over.special_ids(self.model.vocab_size)
        return {"bos_token_id": begin_of_text(self.tokenizer), "eos_token_id": self.tokenizer.end_of_text}

    def generation_config(self) -> dict[str, Any]:
        """The content of ``generation_config.json``: the original's settings, with its ids if they fit this tokenizer."""
        ids = {key: value for key, value in self.special_ids().items() if value is not None}
        return ids | self.taken_over.generation_config(self.model.vocab_size, ids=self._keeps_tokenizer)

    @property
    def _keeps_tokenizer(self) -> bool:
        return self.taken_over.tokenizer == self.tokenizer.text_digest

    @property
    def header(self) -> Header:
        """The checkpoint's entries about the run."""
        return self.checkpoint.manifest.header

    def read(self, name: str) -> Tensor:
        """A parameter's whole fp32 value, on the CPU."""
        value = self.checkpoint.weight(name)
        rows = self.model.vocab_size if name in {EMBEDDING, HEAD} else value.shape[0]
        return value[:rows]

    def with_head(self) -> "Source":
        """The same model with a separate head, a copy of the embedding, for programs without tied heads."""
        model = replace(self.model, tie_head=False)
        return _Untied(self.checkpoint, model, self.tokenizer, self.dtype, self.taken_over)


def begin_of_text(tokenizer: Tokenizer) -> int | None:
    """The id that begins a text, from the tokenizer's own files for Hugging Face libraries; None: there is none."""
    if tokenizer.begin_of_text is not None:
        return tokenizer.begin_of_text
    files = tokenizer_files(tokenizer)
    named = begin_named_in(files)
    return None if named is None else vocabulary(parse_tokenizer(files[TOKENIZER_JSON])).get(named)


class _Untied(Source):
    def read(self, name: str) -> Tensor:
        return super().read(EMBEDDING if name == HEAD else name)
