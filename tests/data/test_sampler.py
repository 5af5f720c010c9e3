import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalegpt.data.windows.sampler import WindowSampler, cut_windows, held_out_starts, permute, rank_share
from scalegpt.errors import InputError

KNOWN = [803769, 599033, 873977, 996409, 306681]
KEYS = st.binary(min_size=64, max_size=64)


@given(size=st.integers(1, 3000), key=KEYS)
@settings(max_examples=60, deadline=None)
def test_permutation(size, key):
    result = permute(np.arange(size), size, key)
    assert sorted(result) == list(range(size))


@given(size=st.integers(1, 2**50), key=KEYS, data=st.data())
@settings(max_examples=60, deadline=None)
def test_permutation_of_a_large_range_keeps_places_apart(size, key, data):
    places = np.array(data.draw(st.lists(st.integers(0, size - 1), unique=True, min_size=1, max_size=50)))
    result = permute(places, size, key)
    assert len(set(result.tolist())) == len(places)
    assert result.min() >= 0
    assert result.max() < size


def test_permutation_looks_random():
    size = 10_000
    order = permute(np.arange(size), size, bytes(range(64)))
    # The correlation of a random permutation with the identity has a standard deviation of 1 / sqrt(size - 1).
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 5 / np.sqrt(size)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / np.sqrt(size)


@given(tokens=st.integers(2, 3000), block=st.integers(1, 300), seed=st.integers(-5, 2**70))
@settings(max_examples=100, deadline=None)
def test_each_window_once_an_epoch_and_inside_the_tokens(tokens, block, seed):
    if tokens <= block:
        with pytest.raises(InputError, match="do not fill one window"):
            WindowSampler(tokens, block, seed)
        return
    sampler = WindowSampler(tokens, block, seed)
    assert sampler.windows == max(1, (tokens - 1) // block - 1)
    for epoch in range(3):
        starts = sampler.starts(epoch * sampler.windows, sampler.windows)
        assert starts.dtype == np.int64
        assert starts.min() >= 0
        assert starts.max() + block + 1 <= tokens
        assert (np.diff(np.sort(starts)) == block).all()


@given(first=st.integers(0, 500), count=st.integers(0, 200), cut=st.integers(0, 200))
@settings(max_examples=50, deadline=None)
def test_any_stretch_is_part_of_one_sequence(first, count, cut):
    sampler, cut = WindowSampler(1000, 16, 7), min(cut, count)
    whole = sampler.starts(first, count)
    parts = [sampler.starts(first, cut), sampler.starts(first + cut, count - cut)]
    assert np.concatenate(parts).tolist() == whole.tolist()


def test_epochs_and_seeds_differ():
    sampler, other = WindowSampler(100_000, 64, 1), WindowSampler(100_000, 64, 2)
    epochs = [sampler.starts(epoch * sampler.windows, sampler.windows) for epoch in range(6)]
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert len({int(epoch.min()) for epoch in epochs}) > 3  # the grid moves
    assert sampler.starts(0, 50).tolist() != other.starts(0, 50).tolist()


def test_the_order_never_changes():
    # A run that is resumed with a later version must see the windows that it would have seen.
    assert WindowSampler(1_000_000, 64, 1337).starts(10, 5).tolist() == KNOWN


@given(data=st.data(), sequences=st.sampled_from([24, 48, 60]), step=st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_all_ranks_together_take_the_same_windows(data, sequences, step):
    ranks = data.draw(st.sampled_from([n for n in range(1, sequences + 1) if sequences % n == 0]))
    per_rank = sequences // ranks
    batch = data.draw(st.sampled_from([n for n in range(1, per_rank + 1) if per_rank % n == 0]))
    starts = WindowSampler(5000, 32, 3).starts(step * sequences, sequences)
    shares = [
        rank_share(starts, rank, ranks, micro, batch) for micro in range(per_rank // batch) for rank in range(ranks)
    ]
    assert np.concatenate(shares).tolist() == starts.tolist()


def test_rank_share_formula():
    starts = np.arange(24)
    ranks, batch = 3, 2
    for micro in range(4):
        for rank in range(3):
            expected = [(micro * ranks + rank) * batch + b for b in range(batch)]
            assert rank_share(starts, rank, ranks, micro, batch).tolist() == expected


def test_windows_are_shifted_by_one_and_independent(tmp_path):
    path = tmp_path / "tokens.bin"
    np.arange(100, dtype="<u2").tofile(path)
    inputs, targets = cut_windows(np.memmap(path, dtype="<u2", mode="r"), np.array([0, 95, 40]), 4)
    assert inputs.tolist() == [[0, 1, 2, 3], [95, 96, 97, 98], [40, 41, 42, 43]]
    assert targets.tolist() == [[1, 2, 3, 4], [96, 97, 98, 99], [41, 42, 43, 44]]
    assert inputs.dtype == targets.dtype == np.int64
    targets[:] = -1
    assert inputs.min() == 0


@given(tokens=st.integers(2, 2000), block=st.integers(1, 200), limit=st.integers(1, 3000))
@settings(max_examples=100, deadline=None)
def test_held_out_windows(tokens, block, limit):
    if tokens <= block:
        with pytest.raises(InputError, match="do not fill"):
            held_out_starts(tokens, block, limit)
        return
    starts = held_out_starts(tokens, block, limit)
    available = (tokens - 1) // block
    assert (starts % block == 0).all()
    assert (np.diff(starts) >= block).all()
    assert starts[0] >= 0
    assert starts[-1] + block + 1 <= tokens
    gaps = np.diff(np.concatenate([[-starts[0] - block], starts, [2 * (available * block) - starts[-1]]]))
    assert gaps.max() - gaps.min() <= 2 * block  # as many windows in every part of the text
    assert len(starts) == available or (len(starts) - 1) * block < limit <= len(starts) * block
