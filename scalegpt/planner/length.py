"""How long a run is: its steps, and what to say where its length may surprise."""

from collections.abc import Iterable, Iterator

from scalegpt.config.train import LENGTHS, TrainConfig


def total_steps(train: TrainConfig, tokens: int) -> int:
    """Optimizer steps until ``max_iters`` or ``max_tokens``, whichever comes first.

    Args:
        train: the run's settings.
        tokens: of an optimizer step, over all ranks.
    """
    return min(_limits(train, tokens).values())


def length_notes(train: TrainConfig, tokens: int, given: Iterable[str]) -> Iterator[str]:
    """What to say of a length, a line each: both limits are given, or only ``max_minutes`` is.

    Args:
        train: the run's settings.
        tokens: of an optimizer step, over all ranks.
        given: the settings that flags, file or preset name.
    """
    limits = _limits(train, tokens)
    if len(limits) == len(LENGTHS):
        shorter = min(LENGTHS, key=lambda key: limits[key])
        longer = next(key for key in LENGTHS if key != shorter)
        yield (
            f"the run ends after {limits[shorter]:,} steps: of max_iters {train.max_iters:,} and max_tokens "
            f"{train.max_tokens:,} the shorter counts; --{shorter} none trains for {limits[longer]:,} steps"
        )
    elif train.max_minutes is not None and not set(given) & set(LENGTHS):
        yield (
            f"max_minutes does not set the length of the run: it ends after {min(limits.values()):,} steps, the default; "
            "give --max_iters or --max_tokens"
        )


def _limits(train: TrainConfig, tokens: int) -> dict[str, int]:
    """Setting → the steps that it allows, of the lengths that are set."""
    limits = {}
    if train.max_iters is not None:
        limits["max_iters"] = train.max_iters
    if train.max_tokens is not None:
        limits["max_tokens"] = -(-train.max_tokens // tokens)
    return limits
