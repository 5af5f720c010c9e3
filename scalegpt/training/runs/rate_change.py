"""What becomes of the learning rate where a run resumes with another length, in numbers, and what else is possible."""

from typing import Any

from scalegpt.config import TrainConfig
from scalegpt.errors import InputError
from scalegpt.training.schedules import decay_start, learning_rate

SCHEDULE = ("schedule", "learning_rate", "min_lr_ratio", "warmup_steps", "decay_fraction")
"""The settings that decide the learning rate of a step, besides the number of all steps."""

NOTABLE = 0.01
"""A change of the rate by less than this share is not worth a line."""


def rate_change(
    theirs: dict[str, Any] | None, plan: dict[str, Any] | None, train: TrainConfig, step: int, total: int
) -> list[str]:
    """Compare the rate of the next step with what it would have been, had nothing been changed.

    Args:
        theirs: the configuration of the run so far, as its file has it; None where it is not known.
        plan: its ``plan.json``, which says how many steps it was to have.
        train: the settings that it resumes with.
        step: the steps taken.
        total: all steps as of now.

    Returns:
        A line, or nothing where the rate stays about the same, no step is left, or the run so far is not known.
    """
    steps_before = (plan or {}).get("steps")
    if not 0 < step < total or theirs is None or type(steps_before) is not int:
        return []
    try:
        known = {key: theirs["train"][key] for key in SCHEDULE if key in theirs["train"]}
        read = TrainConfig.from_mapping({**known, "max_iters": steps_before}, "config.yaml")
    except InputError:  # of another release; what differs is reported setting by setting
        return []
    before = train.changed(**{key: getattr(read, key) for key in known})
    expected, rate = learning_rate(before, step, steps_before), learning_rate(train, step, total)
    if abs(rate - expected) <= NOTABLE * expected:
        return []
    last = learning_rate(before, step - 1, steps_before)
    line = (
        f"the learning rate goes from {last:.2e} in step {step:,} to {rate:.2e} in step {step + 1:,}, and is "
        f"{learning_rate(train, total - 1, total):.2e} in step {total:,}, where the {train.schedule} schedule ends now"
    )
    if before != train:  # the user has changed the schedule itself
        return [line]
    return [f"warning: {line}{_ways_to_keep(train, last, step, total)}"]


def keeping(rate: float) -> str:
    """The flags with which a run resumes at a constant rate."""
    return f"--allow_change schedule,learning_rate --schedule constant --learning_rate {rate:.6g}"


def _ways_to_keep(train: TrainConfig, rate: float, step: int, total: int) -> str:
    if step < train.warmup_steps or rate <= 0:
        return ""
    ways = f"; to stay at {rate:.2e}, add {keeping(rate)}"
    held = train.changed(schedule="wsd", learning_rate=rate)
    if learning_rate(held, step, total) == rate and learning_rate(held, total - 1, total) < rate:
        last_at_peak = decay_start(held, total) + 1  # as in messages, steps are counted from 1
        ways += f"; with --schedule wsd instead of constant it stays until step {last_at_peak:,} and then falls"
    return ways
