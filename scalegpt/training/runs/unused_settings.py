"""Settings that were given and do nothing: said, since whoever gives one expects something of it."""

from collections.abc import Iterator, Set

from scalegpt.config import TrainConfig
from scalegpt.config.optimizers import OWN_SETTINGS
from scalegpt.config.run import RunConfig
from scalegpt.planner.batches import BatchPlan


def unused(run: RunConfig, plan: BatchPlan, given: Set[str]) -> Iterator[str]:
    """A line for each of them; none for one that is at its default, as a run's ``config.yaml`` gives them all.

    Args:
        run: resolved.
        plan: its batch.
        given: keys of the settings that the user gave.
    """
    train, default = run.train, TrainConfig()
    others = frozenset().union(*OWN_SETTINGS.values()) - OWN_SETTINGS[train.optimizer]
    given = {key for key in given & (others | {"loss_chunk"}) if getattr(train, key) != getattr(default, key)}
    yield from (f"{key} is not used: the optimizer is {train.optimizer}" for key in sorted(given & others))
    tokens = plan.micro_batch * plan.block_size
    if "loss_chunk" in given and train.loss == "full":
        yield "loss_chunk is not used: the loss is full"
    elif "loss_chunk" in given and train.loss_chunk > tokens:
        yield (
            f"loss_chunk {train.loss_chunk:,} is more than the {tokens:,} tokens of a micro batch: it is one chunk, and all "
            "its logits exist at once"
        )
