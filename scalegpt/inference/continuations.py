"""Continues prompts with a model: many rows at once, each with its own seed and its own end."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from scalegpt.config.sampling import SamplingSettings
from scalegpt.data.tokenizers import Tokenizer
from scalegpt.model.generation import draw_rows
from scalegpt.model.gpt import GPT

END_OF_TEXT, STOP, LENGTH = "end_of_text", "stop", "length"
"""Why a continuation ended: the model ended the text, a stop text appeared, or ``max_new_tokens`` were drawn."""


class Request(NamedTuple):
    """A continuation to draw: the ids of its prompt, at least one, and its seed."""

    ids: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Continuation:
    """A finished continuation.

    Attributes:
        text: the new text, without the prompt, the end-of-text token and the stop text.
        tokens: number of tokens drawn, including the end-of-text token and those of a stop text.
        seed: the seed that it was drawn with.
        finish_reason: ``end_of_text``, ``stop`` or ``length``.
        logprob: natural logarithm of the probability of all drawn tokens together, at temperature 1 and without top-k
            and top-p.
    """

    text: str
    tokens: int
    seed: int
    finish_reason: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Part:
    """New text of a continuation.

    Attributes:
        index: index of the continuation's request.
        text: new text in whole characters; empty if no character was completed.
        whole: the finished continuation, in its last part; None in earlier parts.
    """

    index: int
    text: str
    whole: Continuation | None


def continue_prompts(
    model: GPT,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    settings: SamplingSettings,
    *,
    stop: Sequence[str] = (),
    micro_batch: int = 1,
) -> Iterator[Part]:
    """Continue prompts, and yield the new text as it is drawn.

    Only prompts of equal length are computed together, so no position is padded. The next batch always contains the
    first request that has not begun.

    Args:
        model: the model, in evaluation mode.
        tokenizer: the model's.
        requests: what to continue; the model reads the last ``block_size`` ids of each.
        settings: how many tokens to draw, and how; its seed is not used.
        stop: texts, none of them empty, that end a continuation where they first appear in it.
        micro_batch: the most continuations computed together.

    Raises:
        DivergedError: the model's logits are not finite.
    """
    block = model.config.block_size
    groups: dict[int, list[int]] = {}  # length → indices of requests, the last one first
    for index in reversed(range(len(requests))):
        groups.setdefault(min(block, len(requests[index].ids)), []).append(index)
    while groups:
        length = min(groups, key=lambda length: groups[length][-1])
        waiting = groups[length]
        batch = [waiting.pop() for _ in range(min(micro_batch, len(waiting)))]
        if not waiting:
            del groups[length]
        rows = [_Row(index, requests[index], tokenizer, settings.max_new_tokens, stop) for index in batch]
        yield from _continue_together(model, tokenizer, rows, settings)


def _continue_together(
    model: GPT, tokenizer: Tokenizer, rows: list["_Row"], settings: SamplingSettings
) -> Iterator[Part]:
    block = model.config.block_size
    prompt = torch.tensor([list(row.request.ids)[-block:] for row in rows], device=model.wte.weight.device)
    draws = draw_rows(
        model, model.config, prompt, settings, seeds=[row.request.seed for row in rows],
        stop_token=tokenizer.end_of_text, limit_vocab=tokenizer.vocab_size,
    )  # fmt: skip
    for drawn in draws:
        for row, token, logprob in zip(rows, drawn.tokens.tolist(), drawn.logprobs.tolist(), strict=True):
            if row.finish_reason is None:
                yield row.take(token, logprob)
        if all(row.finish_reason is not None for row in rows):
            return


class _Row:
    """A continuation that is being drawn."""

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer, most: int, stop: Sequence[str]) -> None:
        self.index, self.request, self.most = index, request, most
        self.end_of_text = tokenizer.end_of_text
        self.decoder, self.filter = tokenizer.stream(), StopFilter(stop)
        self.texts: list[str] = []
        self.tokens, self.logprob = 0, 0.0
        self.finish_reason: str | None = None

    def take(self, token: int, logprob: float) -> Part:
        """Add a token, and return the text that it completes."""
        self.tokens += 1
        self.logprob += logprob
        is_end = token == self.end_of_text
        text = "" if is_end else self.filter.push(self.decoder.push(token))
        if not self.filter.is_stopped and (is_end or self.tokens == self.most):
            text += self.filter.push(self.decoder.finish()) + self.filter.finish()
            self.finish_reason = END_OF_TEXT if is_end else LENGTH
        if self.filter.is_stopped:
            self.finish_reason = STOP
        self.texts.append(text)
        return Part(self.index, text, self._whole())

    def _whole(self) -> Continuation | None:
        if self.finish_reason is None:
            return None
        return Continuation("".join(self.texts), self.tokens, self.request.seed, self.finish_reason, self.logprob)


class StopFilter:
    """Passes text on up to the first stop text, and holds back text that may be the beginning of a stop text.

    Args:
        stop: the stop texts, none of them empty.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = stop
        self.is_stopped = False
        """Whether a stop text has appeared."""
        self._kept = ""

    def push(self, text: str) -> str:
        """Add text, and return what can be passed on."""
        text, self._kept = self._kept + text, ""
        places = [place for each in self.stop if (place := text.find(each)) >= 0]
        if places:
            self.is_stopped = True
            return text[: min(places)]
        longest = max((len(each) - 1 for each in self.stop), default=0)
        for start in range(max(0, len(text) - longest), len(text)):
            if any(each.startswith(text[start:]) for each in self.stop):
                text, self._kept = text[:start], text[start:]
                break
        return text

    def finish(self) -> str:
        """Return the text that was held back."""
        text, self._kept = self._kept, ""
        return text
