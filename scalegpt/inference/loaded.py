"""A loaded model, which continues a prompt."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from scalegpt.checkpoint.manifest import Header
from scalegpt.config import DataConfig
from scalegpt.config.inference import EvaluationSettings
from scalegpt.config.sampling import SamplingSettings
from scalegpt.data.prepare import split_inputs
from scalegpt.data.sidecar import SPLITS
from scalegpt.data.text.documents import is_prepared
from scalegpt.data.tokenizers import Tokenizer
from scalegpt.errors import InputError
from scalegpt.inference.evaluation import Evaluation, Progress, evaluate
from scalegpt.inference.texts import Text, text_of_files, text_of_split, tokens_of_folder, tokens_of_run
from scalegpt.model.generation import generate
from scalegpt.model.gpt import GPT
from scalegpt.text import one_line, shown

DEFAULTS = SamplingSettings()
READING = DataConfig()


class LoadedModel(NamedTuple):
    """A trained model in evaluation mode, its tokenizer, and the header of the checkpoint that it came from."""

    model: GPT
    tokenizer: Tokenizer
    header: Header

    def generate(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int = DEFAULTS.max_new_tokens,
        temperature: float = DEFAULTS.temperature,
        top_k: int | None = DEFAULTS.top_k,
        top_p: float | None = DEFAULTS.top_p,
        seed: int = DEFAULTS.seed,
    ) -> str:
        """Continue a text.

        Args:
            prompt: the text; the model reads its last ``block_size`` tokens. Empty: a new text.
            max_new_tokens: most tokens to draw; fewer are drawn if the model ends the text.
            temperature: divides the logits; 0 always takes the likeliest token.
            top_k: draw among the k likeliest tokens; None: among all.
            top_p: draw among the fewest likeliest tokens whose probabilities reach p together; None: among all.
            seed: the same seed gives the same text.

        Returns:
            The continuation, without the prompt.

        Raises:
            InputError: a value outside its bounds, or a prompt with a character that the vocabulary lacks.
            RunError: the model diverged in training: its logits are not finite.
        """
        given = {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
        }  # fmt: skip
        settings = SamplingSettings.from_mapping(given, "generate()")
        return "".join(self.decode(self.draw(self.prompt_ids(prompt), settings)))

    def evaluate(
        self,
        input_file: str | Path | None = None,
        *,
        split: str | None = None,
        stride: int | None = None,
        micro_batch: int = 8,
        encoding: str = READING.encoding,
        as_text: bool = READING.as_text,
        follow_links: bool = READING.follow_links,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Score how well the model predicts a text, or a split of prepared tokens.

        Args:
            input_file: a text file, a folder of text, several of these separated by commas, or a folder of prepared
                tokens; None: the tokens that the run was trained on.
            split: ``train`` or ``val`` of prepared tokens; None: ``val``. Only for prepared tokens.
            stride: tokens between the starts of two windows, from 1 to ``block_size``; None: ``block_size``. A smaller
                stride gives tokens more context, and takes longer.
            micro_batch: windows computed at once.
            encoding: the encoding of text files; ``auto`` detects each file's.
            as_text: read JSON, CSV, HTML and the like as they are written, and folders that are mostly such data.
            follow_links: follow symbolic links that leave a folder of text.
            progress: called with the share of the text that has been read, and the number of tokens scored.

        Returns:
            The evaluation, with ``loss`` in nats per token, ``perplexity``, ``bits_per_byte``, ``tokens``, ``bytes`` and
            ``documents``.

        Raises:
            InputError: a value outside its bounds; the text cannot be read, or the run's data are not there.
            RunError: the model diverged in training: its loss is not finite.
        """
        given = {"stride": stride, "micro_batch": micro_batch}
        settings = EvaluationSettings.from_mapping(given, "evaluate()")
        reading = {"encoding": encoding, "as_text": as_text, "follow_links": follow_links}
        text = self._text(input_file, split, DataConfig.from_mapping(reading, "evaluate()"))
        return evaluate(self.model, text, stride=settings.stride, micro_batch=settings.micro_batch, progress=progress)

    def _text(self, input_file: str | Path | None, split: str | None, reading: DataConfig) -> Text:
        if split not in (None, *SPLITS):
            raise InputError(f"split must be {' or '.join(SPLITS)}, not {shown(split)}")
        if input_file is None:
            return text_of_split(tokens_of_run(self.header), split or "val")
        if is_prepared(Path(input_file)):
            return text_of_split(tokens_of_folder(Path(input_file), self.tokenizer), split or "val")
        if split is not None:
            raise InputError(
                f"{one_line(input_file)} has no split {split}: it is text, and all of it is scored; omit --split, or "
                "name a folder of prepared tokens"
            )
        return text_of_files(split_inputs(str(input_file)), self.tokenizer, reading)

    def prompt_ids(self, prompt: str) -> list[int]:
        """The token ids of a prompt; for an empty prompt the end-of-text token, or a newline if there is no such token.

        Raises:
            InputError: the vocabulary lacks a character of the prompt, or the newline.
        """
        if prompt:
            return [int(token) for token in self.tokenizer.encode(prompt)]
        if self.tokenizer.end_of_text is not None:
            return [self.tokenizer.end_of_text]
        try:
            return [int(token) for token in self.tokenizer.encode("\n")]
        except InputError:
            raise InputError("this model's vocabulary has no newline to start from; give a prompt") from None

    def draw(self, ids: Sequence[int], settings: SamplingSettings) -> Iterator[int]:
        """Draw the next tokens, and yield the id of each as it is drawn; drawing ends after the end-of-text token.

        Args:
            ids: the token ids of the prompt, at least one.
            settings: how many tokens to draw, and how to draw them.

        Raises:
            DivergedError: the logits are not finite.
        """
        prompt = torch.tensor([list(ids)], device=self.model.wte.weight.device)
        end, known = self.tokenizer.end_of_text, self.tokenizer.vocab_size
        for drawn in generate(self.model, self.model.config, prompt, settings, stop_token=end, limit_vocab=known):
            yield int(drawn)

    def decode(self, tokens: Iterable[int]) -> Iterator[str]:
        """Decode tokens as they are drawn, and yield text in whole characters; the end-of-text token is skipped."""
        decoder = self.tokenizer.stream()
        for token in tokens:
            if token != self.tokenizer.end_of_text:
                yield decoder.push(token)
        yield decoder.finish()
