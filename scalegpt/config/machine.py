"""The machine that a run is planned for: this one, or another."""

from dataclasses import dataclass

from scalegpt.config.settings import Section, setting

MOST_GPUS = 1_000_000
MOST_GB = 1_000_000
MOST_GBPS = 1_000_000
MOST_PRICE = 1_000_000

CPU = "cpu"
"""The value of ``gpu`` that stands for this machine's processor."""


@dataclass(frozen=True, kw_only=True)
class MachineConfig(Section):
    """The cards to plan for, and their number. If neither ``gpu`` nor ``memory_gb`` is set, the GPUs here are detected.

    Raises:
        InputError: a value is outside its bounds.
    """

    gpu: str | None = setting(
        None, "the card, for example a100-40gb, rtx4090 or 'H100 SXM', see `scalegpt gpus`; cpu: this processor"
    )
    memory_gb: float | None = setting(
        None,
        "memory of each card to plan for, in GB of 10⁹ bytes; with --gpu, how much of its memory to use",
        above=0,
        maximum=MOST_GB,
    )
    host_memory_gb: float | None = setting(
        None,
        "host memory of each machine, in GB of 10⁹ bytes; offload needs it; none: the memory available here, or with "
        "--gpu or --gpus an assumed size",
        above=0,
        maximum=1_000_000,
    )
    gpus: int | None = setting(
        None, "GPUs in each machine; none: those found here, or one if --gpu is given", minimum=1, maximum=MOST_GPUS
    )
    nodes: int = setting(1, "machines", minimum=1, maximum=MOST_GPUS)
    network: str | None = setting(
        None,
        "network of each machine: a name such as infiniband-400g or ethernet-25g, several ports of it "
        "(8xinfiniband-400g), or a figure with its unit (50GB/s, 400Gb/s); none: an assumed speed",
    )
    network_gbps: float | None = setting(
        None,
        "network of each machine as a figure, in Gbit/s in each direction, for example 100 or 3200; instead of --network",
        above=0,
        maximum=MOST_GBPS,
    )
    price_per_gpu_hour: float | None = setting(
        None,
        "price of one GPU for one hour, in any currency, for the cost of the run; none: that of your own catalogue, if any",
        above=0,
        maximum=MOST_PRICE,
    )
    margin: float = setting(0.03, "share of each card's memory that a chosen plan leaves free", minimum=0, below=1)

    @property
    def at_hand(self) -> bool:
        """Whether the settings mean the machine that this process runs on."""
        return self.gpu == CPU or (self.gpu is None and self.memory_gb is None)
