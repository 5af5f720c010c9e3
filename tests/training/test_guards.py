"""Which steps are skipped, what counts as a spike, and what a resumed run remembers of it."""

import json
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scalegpt.config import TrainConfig
from scalegpt.errors import RunError
from scalegpt.training.resilience.guards import Guards, write_bad_steps
from scalegpt.training.runs.directory import RunDirectory
from scalegpt.training.runs.metrics_file import GRADIENT, LOSS, SPIKE, RecentSteps, SkippedStep
from stretches import of_one_file

NAN, INF = float("nan"), float("inf")
TRAIN = TrainConfig(warmup_steps=0, spike_window=4, spike_factor=3.0, max_skipped_in_a_row=3)


def guards(losses: list[float], **changes: Any) -> Guards:
    train = TRAIN.changed(**changes)
    return Guards(train, RecentSteps(deque(losses, maxlen=train.spike_window)), skipped=0)


# --- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "loss", "is_spike"),
    [
        ([2.0, 2.1, 2.2, 2.3], 2.58, False),  # 1.2 × the median of 2.15 is 2.58; the deviations' median is 0.1
        ([2.0, 2.1, 2.2, 2.3], 2.59, True),
        ([2.0, 2.0, 2.0, 2.0], 2.39, False),  # however still it was, by a fifth at least
        ([2.0, 2.0, 2.0, 2.0], 2.41, True),
        ([1.0, 2.0, 3.0, 4.0], 5.5, False),  # median 2.5, deviation 1: the limit is 5.5
        ([1.0, 2.0, 3.0, 4.0], 5.51, True),
        ([2.0, 2.0, 2.0], 9.0, False),  # too few to tell
        ([2.0, 2.0, 2.0, 2.0], 0.1, False),
    ],
)
def test_a_spike_is_above_the_median_by_deviations_and_by_a_fifth(
    losses: list[float], loss: float, is_spike: bool
) -> None:
    found = guards(losses).find_spike(9, loss)
    assert (found is not None) == is_spike


def test_only_the_last_steps_count_and_none_of_the_warm_up() -> None:
    assert guards([9.0] * 10 + [2.0] * 4).find_spike(20, 3.0) is not None
    still = guards([2.0] * 4, warmup_steps=10)
    assert still.find_spike(10, 9.0) is None
    assert still.find_spike(11, 9.0) is not None
    assert guards([2.0] * 4, on_spike="off").find_spike(11, 9.0) is None


@pytest.mark.parametrize(("policy", "allowed"), [("off", True), ("warn", True), ("skip", False), ("rollback", False)])
def test_the_policy_decides_whether_a_spike_is_learnt_from(policy: str, allowed: bool) -> None:
    one = guards([2.0] * 4, on_spike=policy)
    assert one.allow(5, 4.0) == allowed
    told = one.conclude(5, 4.0, skipped=not allowed)
    assert told.reason == (None if allowed else SPIKE)
    assert told.as_metrics() == {
        **({} if allowed else {"skipped": True, "reason": SPIKE}),
        **({} if policy == "off" else {"spike": True}),
    }


def test_a_spike_is_told_once_and_a_lasting_one_becomes_the_rule() -> None:
    one, told = guards([2.0] * 4), []
    for step, loss in enumerate([4.0, 4.1, 2.0, 2.0, 2.0, 4.0, 4.0, 4.0, 4.0, 4.0], start=5):
        assert one.allow(step, loss)
        told.append(one.conclude(step, loss, skipped=False).warning("fp32"))
    assert [bool(warning) for warning in told] == [True, False, False, False, False, True, False, False, False, False]
    assert told[0] == "warning: loss spike at step 5: 4.0000, above 2.4000 (median 2.0000)"
    assert one.find_spike(15, 4.0) is None


# --- what is not finite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [NAN, INF, -INF])
def test_a_loss_that_is_not_finite_is_refused_and_not_remembered(loss: float) -> None:
    one = guards([2.0] * 4, on_spike="off")
    assert not one.allow(5, loss)
    told = one.conclude(5, loss, skipped=True)
    assert told.reason == LOSS
    assert told.warning("fp16") == "warning: step 5 is skipped: loss not finite"
    assert list(one.recent.losses) == [2.0] * 4
    assert one.as_status() == {"skipped_steps": 1, "last_skipped": {"step": 5, "reason": LOSS}}


def test_the_gradient_is_the_backends_word_and_no_news_in_fp16() -> None:
    one = guards([])
    assert one.allow(1, 2.0)
    told = one.conclude(1, 2.0, skipped=True)
    assert told.reason == GRADIENT
    assert told.warning("bf16")
    assert told.warning("fp16") is None


def test_only_steps_in_a_row_end_the_run() -> None:
    one = guards([])
    for step, loss in enumerate([NAN, NAN, 1.0, NAN, NAN], start=1):
        one.conclude(step, loss, skipped=not one.allow(step, loss))
    assert (one.skipped, one.gives_up) == (4, False)
    assert one.allow(6, 3.0)
    one.conclude(6, 3.0, skipped=True)
    assert one.gives_up
    with pytest.raises(RunError, match=r"3 steps in a row up to step 6 .*loss not finite, gradient not finite; last"):
        one.raise_skipped()


# --- going on --------------------------------------------------------------------------------------------------------


def remembered(lines: list[dict[str, Any]]) -> RecentSteps:
    known = RecentSteps(deque(maxlen=TRAIN.spike_window))
    for line in lines:
        known.add_line(line)
    return known


def test_a_resumed_run_remembers_what_its_metrics_tell() -> None:
    losses = [3.0, 2.9, NAN, 2.8, 9.0, 2.7, 2.6, 9.0, NAN, 2.5]
    whole = guards([], on_spike="skip")
    lines = []
    for step, loss in enumerate(losses, start=1):
        told = whole.conclude(step, loss, skipped=not whole.allow(step, loss))
        lines.append(
            json.loads(json.dumps({"step": step, "loss": None if loss != loss else loss, **told.as_metrics()}))
        )
        known = remembered(lines)
        assert (known.losses, known.spiking) == (whole.recent.losses, whole.recent.spiking)
        assert [(each.step, each.reason) for each in known.skipped_in_a_row] == [
            (each.step, each.reason) for each in whole.recent.skipped_in_a_row
        ]
    assert whole.skipped == 3
    assert known.last_skipped == SkippedStep(9, LOSS, known.last_skipped.loss)


def test_metrics_of_an_older_version_tell_of_no_reason() -> None:
    known = remembered([{"step": 1, "loss": None, "skipped": True}, {"step": 2, "loss": 1.0}])
    assert (known.last_skipped.reason if known.last_skipped else None, known.skipped_in_a_row, list(known.losses)) == (
        GRADIENT,
        [],
        [1.0],
    )


def test_the_samples_of_bad_steps_are_written(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    stretch = of_one_file(1, 0, 3, 8, 1337, 1000, "train.bin", "digest", "start")
    directory.ledger.append(stretch)
    directory.ledger.append(replace(stretch, first_step=5, first_window=90, reason="rolled back"))
    write_bad_steps(directory, [SkippedStep(4, LOSS, NAN), SkippedStep(5, GRADIENT, 2.0)])
    first, second = (json.loads(line) for line in directory.bad_steps.read_text().splitlines())
    assert (first["step"], first["reason"], first["loss"]) == (4, LOSS, None)
    assert [window["number"] for window in first["windows"]] == [9, 10, 11]
    assert [window["number"] for window in second["windows"]] == [90, 91, 92]
    assert first["windows"][0].keys() == {"order", "number", "source", "file", "offset", "length"}
