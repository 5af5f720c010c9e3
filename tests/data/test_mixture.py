"""Mixtures: exact shares, an order that is a pure function of seed and window number, and sources that belong together."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalegpt.backends import World
from scalegpt.config import DataConfig
from scalegpt.data.prepare import prepare
from scalegpt.data.windows.ledger import ledger_sources
from scalegpt.data.windows.mixture import MixedTokens, Mixture, prepare_mixture
from scalegpt.data.windows.sampler import MixtureSampler, WindowSampler
from scalegpt.errors import InputError
from scalegpt.inputs import MIXTURE_BLOCK, shares_of
from scalegpt.planner.batches import BatchPlan
from scalegpt.training.batches import HeldOutBatches, TrainingBatches

BLOCK = 8
KNOWN_SOURCES = [1, 0, 0, 1, 0, 1, 1, 0, 0, 1]
KNOWN_STARTS = [27631, 20401, 405649, 32219, 661713, 14071, 17663, 517313, 368025, 6507]


def sampler(weights: list[float], tokens: list[int], seed: int = 3) -> MixtureSampler:
    return MixtureSampler(tokens, shares_of(weights), BLOCK, seed)


@given(st.integers(0, 10**9), st.integers(0, 300), st.integers(0, 2**62), st.integers(BLOCK + 1, 10**9))
@settings(max_examples=50, deadline=None)
def test_one_source_has_the_order_that_it_has_alone(first: int, count: int, seed: int, tokens: int) -> None:
    windows = MixtureSampler([tokens], [MIXTURE_BLOCK], BLOCK, seed).windows(first, count)
    assert windows.starts.tolist() == WindowSampler(tokens, BLOCK, seed).starts(first, count).tolist()
    assert not windows.sources.any()


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=6), st.integers(0, 10**7), st.integers(0, 2**62))
@settings(max_examples=25, deadline=None)
def test_every_block_has_exactly_each_share(weights: list[float], block: int, seed: int) -> None:
    drawn = sampler(weights, [10**6] * len(weights), seed).windows(block * MIXTURE_BLOCK, MIXTURE_BLOCK)
    assert np.bincount(drawn.sources, minlength=len(weights)).tolist() == list(shares_of(weights))


def test_each_source_gives_each_of_its_windows_once_an_epoch() -> None:
    weights, tokens = [0.61, 0.29, 0.1], [300_000, 4_000, 70_001]
    mixed = sampler(weights, tokens)
    drawn = mixed.windows(0, 12 * MIXTURE_BLOCK)
    for source, own in enumerate(mixed.samplers):
        starts = drawn.starts[drawn.sources == source]
        # The order inside a block is another one, but the windows of the blocks so far are the source's first ones.
        assert sorted(starts.tolist()) == sorted(own.starts(0, len(starts)).tolist())
    small = drawn.starts[drawn.sources == 1]
    assert len(small) // mixed.samplers[1].windows > 60, "it is repeated while the others are in their first epochs"


def test_sources_are_spread_over_a_block() -> None:
    drawn = sampler([0.9, 0.1], [10**6, 10**6]).windows(0, MIXTURE_BLOCK)
    places = np.flatnonzero(drawn.sources == 1)
    assert len(places) == 1000
    assert np.diff(places).max() < 150  # of a random choice, gaps of 100 are rare
    assert abs(places.mean() - MIXTURE_BLOCK / 2) < 5 * MIXTURE_BLOCK / np.sqrt(12 * 1000)
    again = sampler([0.9, 0.1], [10**6, 10**6], seed=4).windows(0, MIXTURE_BLOCK)
    assert (again.sources != drawn.sources).any()


def test_sources_of_the_same_size_have_orders_of_their_own() -> None:
    first, second = sampler([1, 1], [10_000, 10_000]).samplers
    assert first.starts(0, 50).tolist() != second.starts(0, 50).tolist()


@given(st.integers(0, 50_000), st.integers(0, 25_000), st.integers(0, 25_000))
@settings(max_examples=12, deadline=None)
def test_any_stretch_is_part_of_one_sequence(first: int, count: int, cut: int) -> None:
    mixed, cut = sampler([3, 2, 1], [50_000, 1_000, 9_000]), min(cut, count)
    whole = mixed.windows(first, count)
    parts = mixed.windows(first, cut), mixed.windows(first + cut, count - cut)
    for at in (0, 1):
        assert np.concatenate([part[at] for part in parts]).tolist() == whole[at].tolist()


def test_the_order_never_changes() -> None:
    drawn = sampler([0.7, 0.3], [1_000_000, 50_000], seed=1337).windows(123_456, 10)
    assert (drawn.sources.tolist(), drawn.starts.tolist()) == (KNOWN_SOURCES, KNOWN_STARTS)


@pytest.mark.parametrize(("micro", "accum", "ranks"), [(8, 1, 1), (2, 4, 1), (4, 1, 2), (2, 1, 4), (1, 2, 4)])
def test_all_layouts_and_every_resume_train_on_the_same_windows(micro: int, accum: int, ranks: int) -> None:
    parts = np.arange(9_000, dtype=np.uint16), np.arange(10_000, 11_000, dtype=np.uint16)
    tokens = MixedTokens(parts, shares_of([0.7, 0.3]))
    mixed = MixtureSampler(tokens.sizes, tokens.shares, BLOCK, 3)
    for begin in (0, 1248):  # a run, and one that is resumed at step 1,248, two steps before a block ends
        loaders = [
            TrainingBatches(tokens, BatchPlan(micro, accum, ranks, BLOCK), world, seed=3) for world in worlds(ranks)
        ]
        for step in range(begin, begin + 4):
            seen = []
            for loader in loaders:
                for inputs, targets in loader.step(8 * step):
                    assert torch.equal(targets, inputs + 1)
                    seen += inputs[:, 0].tolist()
            drawn = mixed.windows(8 * step, 8)
            assert sorted(seen) == sorted((drawn.starts + 10_000 * drawn.sources).tolist())
        for loader in loaders:
            loader.close()


def worlds(size: int) -> list[World]:
    return [World(rank, size, rank, size, torch.device("cpu")) for rank in range(size)]


def test_held_out_windows_are_taken_by_the_weights_and_a_small_source_gives_what_it_has() -> None:
    parts = np.zeros(9_000, dtype=np.uint16), np.ones(9_000, dtype=np.uint16), np.full(50, 2, dtype=np.uint16)
    tokens = MixedTokens(parts, shares_of([0.5, 0.3, 0.2]))
    counted = np.zeros(3, dtype=int)
    for world in worlds(3):
        for inputs, _, count, source in HeldOutBatches(tokens, BatchPlan(4, 1, 3, BLOCK), world, 1000):
            assert (inputs == source).all()
            counted[source] += count
    assert counted.tolist() == [504, 304, 48]  # whole windows; of the last, six windows instead of 25


# --- at size ---------------------------------------------------------------------------------------------------------


def test_the_order_of_a_terabyte_needs_no_table() -> None:
    tokens = [10**12, 3 * 10**11, 10**9]
    tracemalloc.start()
    mixed = MixtureSampler(tokens, shares_of([0.7, 0.25, 0.05]), 2048, 1)
    drawn = [mixed.windows(first, 4096) for first in (0, 10**8, 4 * 10**8 + 7)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
    for source in (0, 1):
        starts = np.concatenate([each.starts[each.sources == source] for each in drawn])
        assert len(np.unique(starts)) == len(starts)
        assert starts.max() > 0.99 * tokens[source]
        assert starts.max() + 2049 <= tokens[source]


# --- the sources -----------------------------------------------------------------------------------------------------


def mixture(input_file: str, **given: object) -> Mixture:
    return prepare_mixture(DataConfig.from_mapping({"tokenizer": "byte", **given, "input_file": input_file}, "test"))[0]


def test_each_source_is_prepared_by_itself(sources: Path) -> None:
    mixed = mixture("code=0.3,prose=0.7")
    assert [(source.name, source.share) for source in mixed.sources] == [("prose", 7000), ("code", 3000)]
    assert mixed.labels == ("prose", "code")
    alone = mixture("prose")
    assert alone.sources[0].tokens.path == mixed.sources[0].tokens.path, "it is cached by itself"
    assert alone.digest == alone.sources[0].tokens.digest == mixture("prose=3").digest
    opened = Mixture.open(mixed.places, DataConfig(tokenizer="byte"))
    assert (opened.digest, opened.labels) == (mixed.digest, mixed.labels)
    assert [len(part) for part in opened.train.parts] == list(mixed.train.sizes)
    files = [source.files for source in ledger_sources(mixed)]
    assert files == [
        ((str(source.tokens.path / "train.bin"), 0, len(source.tokens.train)),) for source in mixed.sources
    ]


def test_the_digest_is_of_tokens_and_weights_however_they_are_written(sources: Path) -> None:
    digest = mixture("prose=0.7,code=0.3").digest
    assert mixture("code=3,prose=7").digest == digest
    (sources / "moved").mkdir()
    (sources / "code" / "text.txt").rename(sources / "moved" / "text.txt")
    assert mixture("prose=0.7,moved=0.3").digest == digest
    assert mixture("prose=0.6,moved=0.4").digest != digest
    assert mixture("prose,moved").digest != digest
    (sources / "moved" / "text.txt").write_text("another text " * 400)
    assert mixture("prose=0.7,moved=0.3").digest != digest


def test_labels_are_short_and_of_one_source_each(sources: Path) -> None:
    for name in ("x", "y"):
        Path(name, "prose").mkdir(parents=True)
        Path(name, "prose", "text.txt").write_text(f"{name} once more " * 300)
    assert sorted(mixture("x/prose/=2,y/prose=1,code=1").labels) == ["code", "prose 1", "prose 2"]
    Path("a:b").mkdir()
    Path("a:b", "t.txt").write_text("some text " * 300)
    assert mixture("a:b=2,code=1").labels == ("a_b", "code")


def test_prepared_tokens_and_text_are_mixed_if_they_have_one_tokenizer(sources: Path) -> None:
    prepare(["prose"], sources / "tokens", DataConfig(tokenizer="byte"))
    assert mixture("tokens=1,code=1").tokenizer.kind == "byte"
    with pytest.raises(InputError) as refused:
        mixture("tokens=2,code=1", tokenizer="gpt2")
    assert str(refused.value).startswith("tokens has the tokenizer byte ")
    assert "code has gpt2" in str(refused.value)
    assert "one --tokenizer" in str(refused.value)
    with pytest.raises(InputError, match="each text has its own characters: use --tokenizer byte"):
        mixture("prose=2,code=1", tokenizer="char")


def test_a_source_without_text_is_named(sources: Path) -> None:
    (sources / "short.txt").write_text("ab")
    with pytest.raises(InputError, match=r"none\.txt"):
        mixture("prose=1,none.txt=1")
    with pytest.raises(InputError, match=r"short\.txt gives \d training tokens, fewer than block_size 16"):
        mixture("prose=1,short.txt=1").check(vocab_size=257, block_size=16)
