"""Batches on their way to the device: the ranks together take a step's windows, and evaluation sees the same ones."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalegpt.backends import World
from scalegpt.data.windows.mixture import MixedTokens
from scalegpt.data.windows.sampler import WindowSampler, held_out_starts
from scalegpt.model.chunk import IGNORED
from scalegpt.planner.batches import BatchPlan
from scalegpt.training.batches import HeldOutBatches, ReadAhead, TrainingBatches

BLOCK = 8
TOKENS = np.arange(5000, dtype=np.uint16)  # each token is its own place


def worlds(size: int) -> list[World]:
    return [World(rank, size, rank, size, torch.device("cpu")) for rank in range(size)]


LAYOUTS = [(8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 2, 4), (2, 1, 4), (4, 1, 2), (2, 2, 2)]


@pytest.mark.parametrize(("micro", "accum", "ranks"), LAYOUTS)
def test_all_layouts_train_on_the_same_windows(micro: int, accum: int, ranks: int) -> None:
    plan = BatchPlan(micro, accum, ranks, BLOCK)
    loaders = [TrainingBatches(MixedTokens.alone(TOKENS), plan, world, seed=3) for world in worlds(ranks)]
    for step in (0, 1, 80):  # the last one lies in another epoch
        firsts = []
        for loader in loaders:
            batches = list(loader.step(8 * step))
            assert len(batches) == accum
            for inputs, targets in batches:
                assert inputs.shape == targets.shape == (micro, BLOCK)
                assert inputs.dtype == targets.dtype == torch.int64
                assert torch.equal(targets, inputs + 1)
                firsts += inputs[:, 0].tolist()
        assert sorted(firsts) == sorted(WindowSampler(len(TOKENS), BLOCK, 3).starts(8 * step, 8).tolist())


@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 600), st.integers(BLOCK + 1, 500))
@settings(deadline=None)
def test_evaluation_sees_each_window_once_however_it_is_divided(
    micro: int, ranks: int, limit: int, tokens: int
) -> None:
    plan = BatchPlan(micro, 1, ranks, BLOCK)
    starts = held_out_starts(tokens, BLOCK, limit)
    seen, rounds = [], set()
    for world in worlds(ranks):
        batches = list(HeldOutBatches(MixedTokens.alone(TOKENS[:tokens]), plan, world, limit))
        rounds.add(len(batches))
        for inputs, targets, count, source in batches:
            assert source == 0
            assert inputs.shape == targets.shape == (micro, BLOCK)
            counts = targets != IGNORED
            assert int(counts.sum()) == count
            assert torch.equal(targets[counts], inputs[counts] + 1)
            assert bool((counts.all(dim=1) | ~counts.any(dim=1)).all())  # whole windows
            seen += targets[counts].tolist()
    assert len(rounds) == 1  # sharded models need every rank in every forward pass
    assert sorted(seen) == [start + place for start in starts.tolist() for place in range(1, BLOCK + 1)]


@pytest.mark.parametrize("chunk", [None, 5])
def test_the_held_out_loss_does_not_depend_on_the_layout(tiny_model: Any, chunk: int | None) -> None:
    from scalegpt.model.loss import chunked_cross_entropy

    model = tiny_model(block_size=BLOCK, loss=chunk and chunked_cross_entropy(chunk)).eval()
    tokens = MixedTokens.alone(TOKENS[:200] % 61)
    losses = []
    for micro, ranks in ((1, 1), (25, 1), (7, 1), (3, 3), (4, 16)):  # of the last, most ranks hold padding alone
        total = torch.zeros(2, dtype=torch.float64)
        for world in worlds(ranks):
            for inputs, targets, count, _ in HeldOutBatches(tokens, BatchPlan(micro, 1, ranks, BLOCK), world, 10**6):
                with torch.no_grad():
                    total += torch.stack([model(inputs, targets).double() * count, torch.tensor(float(count)).double()])
        assert total[1] == 24 * BLOCK
        losses.append((total[0] / total[1]).item())
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)


def test_steps_are_read_ahead_and_another_beginning_is_heeded() -> None:
    plan = BatchPlan(2, 3, 1, BLOCK)
    alone = MixedTokens.alone(TOKENS)
    loader = TrainingBatches(alone, plan, worlds(1)[0], seed=3)
    fresh = lambda first: TrainingBatches(alone, plan, worlds(1)[0], seed=3).step(first)  # noqa: E731

    def same(first: int) -> None:
        for (inputs, targets), (expected, wanted) in zip(loader.step(first), fresh(first), strict=True):
            assert torch.equal(inputs, expected)
            assert torch.equal(targets, wanted)

    same(0)
    ahead = loader._ahead
    same(6)
    assert loader._ahead is ahead, "the second step was read ahead"
    same(30)  # as after a rollback
    next(loader.step(36))  # a step that is left in its middle …
    same(36)  # … begins anew
    last = loader._ahead
    loader.close()
    assert not any(each._thread.is_alive() for each in (ahead, last))


def test_what_the_reading_raises_is_raised_where_the_batch_is_asked_for() -> None:
    def broken() -> Any:
        yield np.zeros((1, 2), dtype=np.int64), np.ones((1, 2), dtype=np.int64)
        raise OSError(5, "Input/output error")

    ahead = ReadAhead(broken(), 0, on_cuda=False)
    assert ahead.next()[1].sum() == 2
    with pytest.raises(OSError, match="Input/output error"):
        ahead.next()
    ahead.close()


def test_reading_ahead_ends_though_nobody_takes_what_is_ready() -> None:
    ahead = ReadAhead(iter(lambda: (np.zeros((1, 2), dtype=np.int64),) * 2, None), 0, on_cuda=False, depth=1)
    ahead.close()
    assert not ahead._thread.is_alive()
