"""Settings that were given and do nothing are named."""

from typing import Any

import pytest

from scalegpt.config.presets import resolve
from scalegpt.planner.batches import BatchPlan
from scalegpt.training.runs.summary import unused

SHAPE = {"block_size": 32, "micro_batch": 4, "tokens_per_step": 128}


def told(**flags: Any) -> list[str]:
    run = resolve(preset="tiny", flags={**SHAPE, **flags})
    return list(unused(run, plan(run.train.micro_batch), frozenset({*SHAPE, *flags})))


def plan(micro_batch: int) -> BatchPlan:
    return BatchPlan(micro_batch=micro_batch, grad_accum=1, ranks=1, block_size=32)


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        ({}, []),
        ({"muon_lr": 0.05, "optimizer": "muon"}, []),
        ({"muon_lr": 0.05}, ["muon_lr is not used: the optimizer is adamw"]),
        ({"muon_momentum": 0.9}, ["muon_momentum is not used: the optimizer is adamw"]),
        ({"muon_lr": 0.02, "loss_chunk": 1024}, []),  # the defaults
        ({"loss_chunk": 64, "loss": "full"}, ["loss_chunk is not used: the loss is full"]),
        ({"loss_chunk": 128}, []),
        (
            {"loss_chunk": 129},
            [
                "loss_chunk 129 is more than the 128 tokens of a micro batch: it is one chunk, and all its logits exist "
                "at once"
            ],
        ),
    ],
)
def test_what_does_nothing_is_told(flags: dict[str, Any], lines: list[str]) -> None:
    assert told(**flags) == lines


def test_what_a_preset_says_is_not_the_users_word() -> None:
    run = resolve(preset="tiny", flags={**SHAPE, "loss_chunk": 4096})
    assert list(unused(run, plan(4), frozenset())) == []
