"""The machine that a run is planned for, where it is not the one at hand."""

from dataclasses import dataclass

from scalegpt.config.settings import Section, setting

MOST_GPUS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class MachineConfig(Section):
    """Which cards, and how many.

    Raises:
        InputError: a count below one, or no memory.
    """

    gpu: str | None = setting(None, "the card, such as a100-40gb, rtx4090 or 'H100 SXM'")
    memory_gb: float | None = setting(
        None, "memory to plan for, GB of 10⁹ bytes: of a card that is not known, or the part of --gpu to use", above=0
    )
    gpus: int = setting(1, "GPUs in each machine", minimum=1, maximum=MOST_GPUS)
    nodes: int = setting(1, "machines", minimum=1, maximum=MOST_GPUS)
