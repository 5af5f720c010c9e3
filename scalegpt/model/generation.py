"""Drawing new tokens from a model, one after another, with a key-value cache.

The model is any callable with the arguments of :meth:`scalegpt.model.gpt.GPT.forward`, so a sharded backend can pass
its own callable. Then all ranks call :func:`generate` together. They draw the same tokens, since the draws depend only
on logits and seed.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from scalegpt.config import ModelConfig
from scalegpt.config.sampling import SamplingSettings
from scalegpt.errors import InputError, RunError
from scalegpt.model.attention import GenerationCache

__all__ = ["DivergedError", "Drawn", "Forward", "SamplingSettings", "draw", "draw_rows", "generate"]


class DivergedError(RunError):
    """The model's logits are not finite."""


class Forward(Protocol):
    """A model in evaluation mode, or a function with the same arguments and result."""

    def __call__(self, tokens: Tensor, targets: None, cache: GenerationCache, /) -> Tensor:
        """Return the logits [B, V] of the last position, fp32, for ids [B, t] that follow the tokens in the cache."""
        ...


class Drawn(NamedTuple):
    """One new token for each row.

    Attributes:
        tokens: [B] int64 ids on the CPU.
        logprobs: [B] fp64 on the CPU: the natural logarithm of the probability that the model gives the token among its
            whole vocabulary, at temperature 1 and without top-k and top-p; 0 for a row that has already ended.
    """

    tokens: Tensor
    logprobs: Tensor


def generate(
    forward: Forward,
    config: ModelConfig,
    prompt: Tensor,
    settings: SamplingSettings,
    *,
    stop_token: int | None = None,
    limit_vocab: int | None = None,
) -> Iterator[Tensor]:
    """Yield the tokens of :func:`draw_rows`, [B] int64 ids on the CPU, without their probabilities."""
    for drawn in draw_rows(forward, config, prompt, settings, stop_token=stop_token, limit_vocab=limit_vocab):
        yield drawn.tokens


@torch.no_grad()  # not inference_mode: the hooks that gather sharded weights keep tensors that training uses again
def draw_rows(
    forward: Forward,
    config: ModelConfig,
    prompt: Tensor,
    settings: SamplingSettings,
    *,
    seeds: Sequence[int] | None = None,
    stop_token: int | None = None,
    limit_vocab: int | None = None,
) -> Iterator[Drawn]:
    """Continue each row of the prompt by up to ``max_new_tokens``, yielding every token as soon as it is drawn.

    All rows are computed together, and each has its own random generator on the CPU. The tokens of a row therefore do
    not depend on the other rows, unless two tokens are so close that the rounding of a larger matmul decides. Torch's
    global random state does not change.

    The context grows to T = ``block_size``. Then it cannot slide, since learned and rotary positions tie every cached
    key to the position of its token. Instead the cache is dropped and the newest half of the window is read again from
    position 0. This costs a pass over T/2 tokens for every T/2 tokens drawn, at most twice the arithmetic. Sliding by
    one token would cost a pass over all T tokens for every token drawn. From then on the context is between T/2 and T
    tokens long.

    Args:
        forward: the model, in evaluation mode: without dropout.
        config: the model's shape.
        prompt: [B, t] int64 ids with t at least 1, on the model's device. The last ``block_size`` tokens are read.
        settings: how many tokens to draw, and how.
        seeds: the seed of each row, in place of the one in ``settings``; None: ``settings.seed`` + i for row i.
        stop_token: the id that ends a row. After that, the row yields this id until every row has ended.
        limit_vocab: the size of the tokenizer's vocabulary. If the model's vocabulary is padded to a larger size, ids
            of the padding are never drawn. None: any id may be drawn.

    Yields:
        The new tokens and their probabilities.

    Raises:
        InputError: an empty prompt, or an id outside the model's vocabulary.
        DivergedError: the model's logits are not finite.
    """
    _check_prompt(prompt, config)
    window = config.block_size
    context = prompt[:, -window:]
    cache = GenerationCache(config.n_layer, min(window, context.shape[1] + settings.max_new_tokens - 1))
    seeds = range(settings.seed, settings.seed + len(prompt)) if seeds is None else seeds
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    ended = torch.zeros(prompt.shape[0], dtype=torch.bool)
    fresh, end = context, -1 if stop_token is None else stop_token
    for _ in range(settings.max_new_tokens):
        if cache.length + fresh.shape[1] > window:
            cache.clear()
            fresh = context = context[:, -max(1, window // 2) :]
        logits = forward(fresh, None, cache).cpu().double()
        tokens = _draw_each(logits[:, :limit_vocab], settings, generators).masked_fill(ended, end)
        logprobs = logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=1)
        yield Drawn(tokens, logprobs.masked_fill(ended, 0))
        ended |= tokens == end
        if ended.all():
            return
        fresh = tokens.unsqueeze(1).to(context.device)
        context = torch.cat((context, fresh), dim=1)[:, -window:]


def _draw_each(logits: Tensor, settings: SamplingSettings, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw one token per row, as :func:`draw` does, each with the row's own generator."""
    return torch.cat([draw(logits[i : i + 1], settings, generator) for i, generator in enumerate(generators)])


def draw(logits: Tensor, settings: SamplingSettings, generator: torch.Generator) -> Tensor:
    """Draw one token per row, on the CPU.

    Args:
        logits: [B, V], any device and dtype.
        settings: how to draw.
        generator: a CPU generator, which a greedy draw does not use.

    Returns:
        [B] int64 ids on the CPU.

    Raises:
        DivergedError: a row holds NaN, +infinity, or nothing but -infinity.
    """
    logits = logits.cpu().double()
    peak = logits.amax(dim=-1, keepdim=True)
    if not peak.isfinite().all():  # amax of NaN is NaN
        raise DivergedError(
            "the model's logits are not finite: training diverged; use an earlier checkpoint, or train again"
        )
    if settings.temperature == 0 or settings.top_k == 1:
        return logits.argmax(dim=-1)
    # With the peak at 0, even the tiniest temperature divides without overflow or NaN at the top.
    probabilities, ids = _candidates((logits - peak) / settings.temperature, settings)
    chosen = torch.multinomial(probabilities, 1, generator=generator)
    return (chosen if ids is None else ids.gather(1, chosen)).squeeze(1)


def _candidates(logits: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor | None]:
    """Apply top-k, then top-p to the probabilities of the remaining k tokens.

    Args:
        logits: [B, V], already divided by the temperature.
        settings: how to draw.

    Returns:
        Probabilities [B, k], which need not add up to one, and their ids [B, k], or None if column i has id i.
    """
    k = min(settings.top_k or logits.shape[-1], logits.shape[-1])
    if settings.top_p is None and k == logits.shape[-1]:
        return logits.softmax(dim=-1), None
    kept, ids = logits.topk(k, sorted=True)
    probabilities = kept.softmax(dim=-1)
    if settings.top_p is not None:
        # A token stays if the tokens before it have not reached p. So the token that reaches p stays, and the first always.
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= settings.top_p, 0.0)
    return probabilities, ids


def _check_prompt(prompt: Tensor, config: ModelConfig) -> None:
    if prompt.shape[1] == 0:
        raise InputError("the prompt is empty; give at least one token to continue")
    low, high = int(prompt.min()), int(prompt.max())
    if low < 0 or high >= config.vocab_size:
        worst = low if low < 0 else high
        raise InputError(f"the prompt holds token {worst}, but the model's tokens are 0 to {config.vocab_size - 1}; "
                         "use the tokenizer that the model was trained with")  # fmt: skip
