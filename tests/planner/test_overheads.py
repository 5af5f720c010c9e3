"""The parts outside the step's tensors: that they add up, and that each has a source."""

from typing import Any

import pytest

from scalegpt.config.presets import resolve
from scalegpt.hardware.gpus import catalogue, find_card
from scalegpt.hardware.machine import Machine
from scalegpt.planner.memory import overheads
from scalegpt.planner.memory.overheads import MIB, Figure, Overheads
from scalegpt.planner.plan import Estimator

PEAK = 10 * 2**30


def made(gpu: str | None = "4090", ranks: int = 1, **flags: Any) -> Overheads:
    return Overheads.of(resolve(flags=flags), find_card(gpu) if gpu else None, ranks)


@pytest.mark.parametrize("card", [*(card.name for card in catalogue()), None])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_the_parts_add_up(card: str | None, ranks: int) -> None:
    given = made(card, ranks, backend="fsdp")
    for peak in (0, 1, PEAK, 7 * PEAK):
        parts = given.parts(peak)
        assert peak + sum(parts.values()) == given.total_bytes(peak)
        assert given.reserved_bytes(peak) == given.total_bytes(peak) - parts["CUDA context"] - parts["NCCL"]
        assert peak <= given.reserved_bytes(peak) <= given.total_bytes(peak)
        assert all(size >= 0 for size in parts.values())
    assert 0.3e9 < given.total_bytes(PEAK) - PEAK < 4e9  # on the safe side, and not silly


def test_more_tensors_never_mean_less_memory() -> None:
    totals = [made().total_bytes(peak) for peak in range(0, PEAK, PEAK // 50)]
    assert totals == sorted(totals)


def test_workspaces_follow_the_architecture() -> None:
    assert made("a100-40gb").workspaces == 2 * 8_519_680  # 8.125 MiB for each of two handles
    assert made("h100").workspaces == made("b200").workspaces == made("5090").workspaces == 64 * MIB
    assert made("mi250x").workspaces == (2 * 32 + 76) * MIB
    assert made("mi300x").workspaces == (2 * 128 + 76) * MIB


def test_nccl_is_there_where_ranks_talk_and_grows_with_them() -> None:
    assert made(backend="plain").nccl == 0
    sizes = [made(ranks=ranks, backend="fsdp").nccl for ranks in (1, 2, 3, 4, 5, 8, 9, 64, 1024)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == 1_600_000_000


def test_an_unknown_card_counts_as_the_most_demanding() -> None:
    known = [made(card.name) for card in catalogue() if not card.is_amd]
    assert made(None).context == max(each.context for each in known)
    assert made(None).workspaces == max(each.workspaces for each in known)


def test_what_was_measured_takes_the_place_of_the_tables() -> None:
    given = made(ranks=8, backend="fsdp").corrected(fragmentation_share=0.01, outside=2 * 10**9, measured=3)
    assert given.measured == 3
    assert given.context + given.nccl == 2 * 10**9
    assert given.fragmentation_share == 0.01
    assert made(ranks=8, backend="fsdp").corrected(fragmentation_share=0, outside=100, measured=1).nccl == 100


def test_an_estimator_keeps_the_communicators_of_shard_sizes_apart() -> None:
    """Replicas of shards have two communicators more, whichever layout the estimator saw first."""
    machine = Machine.with_card(find_card("a100-40gb"), gpus=4, nodes=2)
    runs = [resolve(flags={"backend": "fsdp", "zero_stage": 3, "shard_size": size}) for size in (None, 4, 2)]
    for order in (runs, runs[::-1]):
        estimator = Estimator(machine)
        found = {run.parallel.shard_size: estimator.overheads(run, 8) for run in order}
        assert found == {run.parallel.shard_size: Overheads.of(run, machine.card, 8) for run in runs}
        assert found[4].nccl > found[None].nccl


def test_every_figure_says_where_it_comes_from() -> None:
    tables = [value for value in vars(overheads).values() if isinstance(value, Figure | dict)]
    figures = [each for table in tables for each in (table.values() if isinstance(table, dict) else [table])]
    figures = [each for each in figures if isinstance(each, Figure)]
    assert len(figures) > 12
    assert all(len(each.source) > 15 for each in figures)
    assert any(each.source.startswith("~") for each in figures)
