"""The learning rate of a step, and whether periodic work is due after it. Both are functions of the step's number."""

import math

from scalegpt.config import TrainConfig


def learning_rate(train: TrainConfig, step: int, total: int) -> float:
    """The learning rate of one optimizer step.

    Linear warm-up to the peak at step ``warmup_steps``, then

    - ``cosine``: half a cosine down to ``min_lr_ratio`` of the peak at the end;
    - ``wsd`` (warm-up, stable, decay): the peak, then linearly down over the last ``decay_fraction`` of all steps;
    - ``constant``: the peak.

    Args:
        train: the settings.
        step: the step about to be taken, counted from 0.
        total: total number of steps of the run.
    """
    peak, last = train.learning_rate, train.learning_rate * train.min_lr_ratio
    if step < train.warmup_steps:
        return peak * (step + 1) / (train.warmup_steps + 1)
    if train.schedule == "constant":
        return peak
    if train.schedule == "cosine":
        progress = _share(step - train.warmup_steps, total - train.warmup_steps)
        return last + (peak - last) * 0.5 * (1 + math.cos(math.pi * progress))
    start = decay_start(train, total)
    return peak + (last - peak) * _share(step - start, total - start)


def decay_start(train: TrainConfig, total: int) -> int:
    """The last step, counted from 0, at which the ``wsd`` schedule has its peak rate.

    After this step the rate falls.
    """
    return max(train.warmup_steps, total - math.ceil(total * train.decay_fraction))


def is_due(step: int, every: int) -> bool:
    """Whether work that is done every ``every`` steps is due after this many steps. It never is if ``every`` is 0."""
    return every > 0 and step % every == 0


def _share(done: int, whole: int) -> float:
    """``done / whole``, clamped to the range from 0 to 1; 1 if ``whole`` is not positive."""
    return min(1.0, max(0.0, done / whole)) if whole > 0 else 1.0
