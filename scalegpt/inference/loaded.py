"""A loaded model, which continues a prompt."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from scalegpt.checkpoint.manifest import Header
from scalegpt.config.sampling import SamplingSettings
from scalegpt.data.tokenizers import Tokenizer
from scalegpt.errors import InputError
from scalegpt.model.generation import generate
from scalegpt.model.gpt import GPT

DEFAULTS = SamplingSettings()


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
