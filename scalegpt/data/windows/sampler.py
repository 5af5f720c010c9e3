"""The order of a run's training windows: a pure function of seed, block size, and number of tokens and share of each source.

No state and no permutation is stored, so a run may resume at any window, on any number of ranks, and see the same windows as
without the interruption. Every window occurs exactly once in an epoch of its source. :mod:`.ledger` records what each step
consumed.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from scalegpt.data.stored import StoredTokens, Tokens
from scalegpt.errors import InputError
from scalegpt.inputs import MIXTURE_BLOCK

Numbers = npt.NDArray[np.int64]
Starts = npt.NDArray[np.int64]
Batch = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

_ROUNDS = 8


class WindowSampler:
    """The order of training windows.

    A window spans ``block_size + 1`` tokens: its targets are its inputs shifted by one. Neighbouring windows begin
    ``block_size`` tokens apart, so that no token is a target twice in an epoch. Each epoch shifts all windows by another
    pseudo-random offset: window boundaries differ, and tokens that one epoch misses at the ends occur in another.

    Args:
        tokens: number of training tokens.
        block_size: T, the model's context.
        seed: any integer.
        source: number of the source in a mixture, from 0: sources of the same size have different orders.

    Attributes:
        windows: number of windows in an epoch.

    Raises:
        InputError: there are too few tokens for one window.
    """

    def __init__(self, tokens: int, block_size: int, seed: int, source: int = 0) -> None:
        _check_length(tokens, block_size)
        self.tokens, self.block_size, self.seed, self.source = tokens, block_size, seed, source
        # One window less than fits, so that all windows can shift by up to a whole block.
        self.windows = max(1, (tokens - 1) // block_size - 1)

    def starts(self, first: int, count: int) -> Starts:
        """The token offsets at which the run's windows ``first … first + count - 1`` begin, int64 [count].

        Window g belongs to epoch ``g // windows``.
        """
        assert first >= 0
        assert count >= 0
        return self.starts_of(np.arange(first, first + count, dtype=np.int64))

    def starts_of(self, numbers: Numbers) -> Starts:
        """The token offsets at which the windows with these numbers begin, int64 [N]."""
        epochs, places = np.divmod(numbers, self.windows)
        result = np.empty(len(numbers), dtype=np.int64)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            result[inside] = self._epoch_starts(int(epoch), places[inside])
        return result

    def _epoch_starts(self, epoch: int, places: Starts) -> Starts:
        order = permute(places, self.windows, self._key("order", epoch, 8 * _ROUNDS))
        room = self.tokens - 1 - self.windows * self.block_size
        offset = int.from_bytes(self._key("offset", epoch, 16), "little") % (room + 1)
        return order * self.block_size + offset

    def _key(self, purpose: str, epoch: int, size: int) -> bytes:
        """Hash the purpose, seed and epoch to ``size`` bytes. A generator's output may change with numpy."""
        source = f" {self.source}" if self.source else ""
        return hashlib.blake2b(f"{purpose} {self.seed} {epoch}{source}".encode(), digest_size=size).digest()


class Windows(NamedTuple):
    """Windows of one source or of several, in an order.

    Attributes:
        sources: the number of each window's source, int64 [N].
        starts: the token offset at which each begins in its source, int64 [N].
    """

    sources: Numbers
    starts: Starts


class MixtureSampler:
    """The order of training windows of several sources. With one source it is that of :class:`WindowSampler`.

    The order comes in blocks of :data:`~scalegpt.inputs.MIXTURE_BLOCK` windows. In each block every source has exactly its
    share. A permutation, keyed by seed and block, spreads the sources over the block's places. A source's windows are in the
    order of its own :class:`WindowSampler`, so each source has its own epochs. All this is a function of the seed and the
    window's number; nothing is stored.

    Args:
        tokens: number of training tokens of each source.
        shares: number of windows of each source in a block; they add up to the block.
        block_size: T, the model's context.
        seed: any integer.

    Raises:
        InputError: a source has too few tokens for one window.
    """

    def __init__(self, tokens: Sequence[int], shares: Sequence[int], block_size: int, seed: int) -> None:
        assert sum(shares) == MIXTURE_BLOCK
        assert len(tokens) == len(shares)
        self.seed = seed
        self.samplers = [WindowSampler(count, block_size, seed, source) for source, count in enumerate(tokens)]
        self._shares = np.array(shares, dtype=np.int64)
        self._ends = np.cumsum(self._shares)

    def windows(self, first: int, count: int) -> Windows:
        """The run's windows ``first … first + count - 1``."""
        numbers = np.arange(first, first + count, dtype=np.int64)
        if len(self.samplers) == 1:
            return Windows(np.zeros_like(numbers), self.samplers[0].starts_of(numbers))
        blocks, places = np.divmod(numbers, MIXTURE_BLOCK)
        for block in range(first // MIXTURE_BLOCK, -(-(first + count) // MIXTURE_BLOCK)):
            part = slice(max(0, block * MIXTURE_BLOCK - first), (block + 1) * MIXTURE_BLOCK - first)
            places[part] = permute(places[part], MIXTURE_BLOCK, self._key(block))
        sources = np.searchsorted(self._ends, places, side="right")
        within = places - (self._ends - self._shares)[sources]
        numbers = blocks * self._shares[sources] + within
        starts = np.empty_like(numbers)
        for source, sampler in enumerate(self.samplers):
            inside = sources == source
            starts[inside] = sampler.starts_of(numbers[inside])
        return Windows(sources, starts)

    def _key(self, block: int) -> bytes:
        return hashlib.blake2b(f"mixture {self.seed} {block}".encode(), digest_size=8 * _ROUNDS).digest()


def permute(places: Starts, size: int, key: bytes) -> Starts:
    """Apply a pseudo-random permutation of the integers in [0, size) to each of ``places``, without storing it.

    A Feistel network permutes the integers of 2k bits, with the smallest k for which they include [0, size). A result of
    ``size`` or more goes through the network again until it is below ``size`` (cycle walking). Because the network is a
    permutation, this ends, and different places get different results.

    Args:
        places: int64 [N], each in [0, size).
        size: the number of places.
        key: 8 bytes for each of the 8 rounds.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    keys = np.frombuffer(key, dtype="<u8")
    result = _feistel(places.astype(np.uint64), half, keys)
    outside = np.flatnonzero(result >= size)
    while len(outside):  # 2k bits hold at most four times ``size`` numbers, so a few passes suffice
        result[outside] = _feistel(result[outside], half, keys)
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def _feistel(numbers: _Words, half: np.uint64, keys: _Words) -> _Words:
    """Permute numbers of ``2 * half`` bits: each round swaps the halves and XORs one with a hash of the other."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = numbers >> half, numbers & mask
    hashed, spare = np.empty_like(left), np.empty_like(left)  # new arrays in each round would take longer
    for key in keys:
        np.bitwise_xor(right, key, out=hashed)
        _mix(hashed, spare)
        hashed &= mask
        hashed ^= left
        left, right, hashed = right, hashed, left
    return (left << half) | right


def _mix(words: _Words, spare: _Words) -> None:
    """Hash 64-bit words in place by the finaliser of splitmix64, in arithmetic modulo 2^64; ``spare`` is overwritten."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        np.right_shift(words, np.uint64(shift), out=spare)
        words ^= spare
        words *= np.uint64(factor)
    np.right_shift(words, np.uint64(31), out=spare)
    words ^= spare


def rank_share(windows: Numbers, rank: int, ranks: int, micro_step: int, micro_batch: int) -> Numbers:
    """The part of a step's windows that one rank takes in one micro step, int64 [B].

    Window j of the step is window b of rank r in micro step m, where j = (m·W + r)·B + b. For any W, B and gradient
    accumulation the ranks together take all windows of the step, each once.

    Args:
        windows: int64 [W·B·accumulation], a number for each window of the step: its start, or its source.
        rank: r, in [0, W).
        ranks: W.
        micro_step: m, counted from 0.
        micro_batch: B, windows per rank and micro step.
    """
    first = (micro_step * ranks + rank) * micro_batch
    assert 0 <= rank < ranks
    assert first + micro_batch <= len(windows)
    return windows[first : first + micro_batch]


def cut_windows(tokens: Tokens | StoredTokens, starts: Starts, block_size: int) -> tuple[Batch, Batch]:
    """Read windows and split each into inputs and targets.

    Args:
        tokens: all tokens, in a file or in memory; only the windows are read.
        starts: int64 [B], the token offset at which each window begins.
        block_size: T.

    Returns:
        Inputs and targets, each int64 [B, T], contiguous, writable and independent of each other.
    """
    inputs = np.empty((len(starts), block_size), dtype=np.int64)
    targets = np.empty_like(inputs)
    for row, start in enumerate(starts.tolist()):
        window = tokens[start : start + block_size + 1]
        inputs[row], targets[row] = window[:-1], window[1:]
    return inputs, targets


def held_out_starts(tokens: int, block_size: int, limit_tokens: int) -> Starts:
    """The token offsets at which the evaluation windows begin, int64 [N]: always the same windows, without overlap.

    The windows are spread evenly over all held-out tokens. The tokens are in the order of file names, so the first windows
    alone would represent only the first files.

    Args:
        tokens: number of held-out tokens.
        block_size: T.
        limit_tokens: take the fewest windows that hold at least this many targets; all windows, if all hold fewer.

    Raises:
        InputError: there are too few tokens for one window.
    """
    _check_length(tokens, block_size)
    windows = (tokens - 1) // block_size
    count = min(max(1, -(-limit_tokens // block_size)), windows)
    numbers = np.arange(count, dtype=np.int64)
    if count < windows:
        numbers = (2 * numbers + 1) * windows // (2 * count)  # the middle of each of ``count`` equal shares
    return numbers * block_size


def _check_length(tokens: int, block_size: int) -> None:
    if tokens < block_size + 1:
        raise InputError(
            f"{tokens} tokens do not fill one window of block_size {block_size} + 1; "
            "use a shorter --block_size or more text"
        )
