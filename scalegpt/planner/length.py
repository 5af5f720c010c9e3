"""The length of a run in optimizer steps, and remarks on lengths that may surprise the user."""

from collections.abc import Iterable, Iterator

from scalegpt.config.train import LENGTHS, TrainConfig


def total_steps(train: TrainConfig, tokens: int) -> int:
    """Optimizer steps until ``max_iters`` or ``max_tokens``, whichever comes first.

    Args:
        train: the run's settings.
        tokens: tokens of one optimizer step, over all ranks.
    """
    return min(_limits(train, tokens).values())


def length_notes(train: TrainConfig, tokens: int, given: Iterable[str]) -> Iterator[str]:
    """Remarks on a run's length, a line each: both limits are set, or ``max_minutes`` is given without either limit.

    Args:
        train: the run's settings.
        tokens: tokens of one optimizer step, over all ranks.
        given: names of the settings that flags, file or preset give.
    """
    limits = _limits(train, tokens)
    if len(limits) == len(LENGTHS):
        shorter = min(LENGTHS, key=lambda key: limits[key])
        longer = next(key for key in LENGTHS if key != shorter)
        yield (
            f"the run ends after {limits[shorter]:,} steps, the shorter of max_iters {train.max_iters:,} and max_tokens "
            f"{train.max_tokens:,}; --{shorter} none trains for {limits[longer]:,} steps"
        )
    elif train.max_minutes is not None and not set(given) & set(LENGTHS):
        yield (
            f"max_minutes does not set the length of the run: it ends after {min(limits.values()):,} steps, the default; "
            "give --max_iters or --max_tokens"
        )


def _limits(train: TrainConfig, tokens: int) -> dict[str, int]:
    """Setting (``max_iters``, ``max_tokens``) → the optimizer steps that it allows; settings without a value are left out."""
    limits = {}
    if train.max_iters is not None:
        limits["max_iters"] = train.max_iters
    if train.max_tokens is not None:
        limits["max_tokens"] = -(-train.max_tokens // tokens)
    return limits
