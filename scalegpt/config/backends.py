"""The specification of each backend, and the mesh of a run's ranks.

The settings, the planner, the trainer and the messages read the specifications. :mod:`scalegpt.backends` has the
backends themselves. To add a backend: a :class:`BackendSpec` in :data:`BACKENDS`, its maker in
:mod:`scalegpt.backends`, and its entries in the planner's tables, whose keys are specifications.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from scalegpt.errors import InputError

OFFLOADS = ("none", "optimizer", "all")
"""What ``--offload`` keeps in host memory: nothing; the optimizer's state; or that state, weights and gradients."""

OPTIMIZER_STATE, GRADIENTS, WEIGHTS = "optimizer", "gradients", "weights"
"""The model states that a ZeRO stage may cut into shards; fp32 master weights belong to the optimizer's state."""

ZERO_CUTS = {OPTIMIZER_STATE: 1, GRADIENTS: 2, WEIGHTS: 3}
"""Model state → the lowest stage at which ZeRO cuts it (Rajbhandari et al. 2020, arXiv 1910.02054, section 5)."""


@dataclass(frozen=True)
class Mesh:
    """The data-parallel ranks as a grid of ``replicas`` × ``shards``.

    The ZeRO stage decides which model states (:data:`ZERO_CUTS`) are cut into ``shards`` parts, one on each rank of a
    replica. Each replica therefore holds all parts of these states. All other states are whole on every rank. Each rank
    computes on its own data. Rank r is shard r mod ``shards`` of replica r ÷ ``shards`` (rounded down), so the shards
    of one replica, which exchange the most data, are on neighbouring ranks.

    - Mesh(W, 1): W replicas; no state is cut (stage 0).
    - Mesh(1, W): one replica; the states are cut over all W ranks (ZeRO, FSDP2).
    - Mesh(R, S): R replicas of S shards (HSDP); S is the setting ``shard_size``.
    - Mesh(1, W, N): as Mesh(1, W), and every N neighbouring ranks also hold a copy of the weights, cut among them (ZeRO++'s
      hpZ); N is the setting ``shard_size``.

    Collectives over shards gather weights and scatter gradients. Collectives over replicas sum the gradients of a shard.

    Attributes:
        replicas: R, the number of replicas.
        shards: S, the ranks of a replica.
        copy_over: N, the ranks among which each second copy of the weights is cut; 0: there is none.
    """

    replicas: int = 1
    shards: int = 1
    copy_over: int = 0

    @property
    def ranks(self) -> int:
        """W, the number of data-parallel ranks."""
        return self.replicas * self.shards

    def place(self, rank: int) -> tuple[int, int]:
        """The index of the replica that a rank belongs to, and the index of the shard that the rank holds."""
        return divmod(rank, self.shards)


@dataclass(frozen=True, kw_only=True, eq=False)
class BackendSpec:
    """The specification of one backend.

    Attributes:
        name: the value of ``--backend`` that selects it.
        help: a description for ``--help``.
        stages: the ZeRO stages that the backend offers.
        default_stage: the stage of a run that does not set one.
        cut_from: model state → the lowest stage at which the state is cut over the shards.
        flat_from: the lowest stage at which the optimizer updates flat (one-dimensional) parts of many tensors instead
            of matrices; None: it updates single tensors at every stage.
        offloads: value of ``--offload`` → the stages at which the backend offers it.
        offload_rule: ``offloads`` in words, with the flags to use, for the end of an error message.
        replicates_shards: whether several replicas may have several shards each. If not, ``shard_size`` says among how many
            ranks a second copy of the weights is cut.
        shard_size_stages: the stages at which ``shard_size`` can be set.
        shard_size_offloads: the values of ``--offload`` with which it can be set.
        shard_size_rule: ``shard_size_stages`` in words, with the flags to use, for the end of an error message.
        launcher: the program that starts the ranks on one machine; ``python``: the backend runs in one process.
        package: the Python package that the backend needs beside torch; None: torch is enough.
    """

    name: str
    help: str
    stages: tuple[int, ...]
    default_stage: int
    cut_from: Mapping[str, int] = field(default_factory=lambda: ZERO_CUTS)
    flat_from: int | None = None
    offloads: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    offload_rule: str = ""
    replicates_shards: bool = False
    shard_size_stages: tuple[int, ...] = ()
    shard_size_offloads: tuple[str, ...] = OFFLOADS
    shard_size_rule: str = ""
    launcher: str = "torchrun"
    package: str | None = None

    @property
    def one_process(self) -> bool:
        """Whether the backend runs in one process, without a process group."""
        return self.launcher == "python"

    @property
    def has_stages(self) -> bool:
        """Whether the backend offers more than one stage."""
        return len(self.stages) > 1

    def cuts(self, state: str, stage: int) -> bool:
        """Whether a model state, for example :data:`GRADIENTS`, is cut over the shards at a stage."""
        return stage >= self.cut_from[state]

    def updates_flat_parts(self, stage: int) -> bool:
        """Whether the optimizer updates flat (one-dimensional) parts of many tensors at a stage, not single tensors."""
        return self.flat_from is not None and stage >= self.flat_from

    def mesh(self, stage: int, ranks: int, shard_size: int | None = None) -> Mesh:
        """The mesh of the ranks at a stage: each rank is a replica if no state is cut, else a shard.

        Of ``shard_size`` ranks each is a replica or, with this backend, a second copy of the weights; None: all ranks.

        Raises:
            InputError: the number of ranks is not a multiple of ``shard_size``.
        """
        if not self.cuts(OPTIMIZER_STATE, stage):
            return Mesh(ranks, 1)
        shards = shard_size or ranks
        if ranks % shards:
            raise InputError(f"shard_size {shards} does not divide {_ranks(ranks)}; use {_sizes_near(shards, ranks)}")
        if self.replicates_shards:
            return Mesh(ranks // shards, shards)
        return Mesh(1, ranks, shards if shards < ranks else 0)

    def launch(self, gpus: int, machines: int = 1) -> list[str]:
        """The first words of the command that runs a script on a machine's ranks: the launcher and its options."""
        if machines > 1:
            place = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "FIRST_MACHINE:29500"]
            return ["torchrun", "--nnodes", str(machines), "--nproc_per_node", str(gpus), *place]
        if self.launcher == "deepspeed":
            return [self.launcher, "--num_gpus", str(gpus)]
        return ["torchrun", "--nproc_per_node", str(gpus)] if gpus > 1 else ["python"]

    def check_mesh(self, mesh: Mesh) -> None:
        """Refuse a mesh that the backend cannot run.

        Raises:
            InputError: a backend of one process gets several ranks, or one without such a layout several replicas of
                several shards.
        """
        if self.one_process and mesh.ranks > 1:
            others = " or ".join(f"--backend {spec.name}" for spec in BACKENDS.values() if not spec.one_process)
            raise InputError(f"backend {self.name} runs in one process, not {mesh.ranks}; use {others}")
        if mesh.replicas > 1 and mesh.shards > 1 and not self.replicates_shards:
            raise InputError(
                f"backend {self.name} cannot run {mesh.replicas} replicas of {mesh.shards} shards; use one replica"
            )

    def check_shard_size(self, shard_size: int | None, stage: int, offload: str) -> None:
        """Refuse ``shard_size`` at a stage or with an offload that does not have it.

        Raises:
            InputError: the backend does not have it there; the message says what to use.
        """
        if shard_size is None or (stage in self.shard_size_stages and offload in self.shard_size_offloads):
            return
        if not self.shard_size_stages:
            others = " or ".join(spec.name for spec in BACKENDS.values() if spec.shard_size_stages)
            raise InputError(
                f"shard_size {shard_size} needs backend {others}, not {self.name}; or use --shard_size none"
            )
        raise InputError(f"shard_size {shard_size}: {self.name} {self.shard_size_rule}; or use --shard_size none")

    def check_offload(self, offload: str, stage: int) -> None:
        """Refuse an offload that the backend does not have at a stage.

        Raises:
            InputError: the backend does not have the offload; the message says what to use.
        """
        if offload == "none" or stage in self.offloads.get(offload, ()):
            return
        if not self.offloads:
            others = " or ".join(spec.name for spec in BACKENDS.values() if spec.offloads)
            raise InputError(f"offload {offload} needs backend {others}, not {self.name}")
        raise InputError(f"{self.name} {self.offload_rule}")


PLAIN = BackendSpec(name="plain", help="one process", stages=(0,), default_stage=0, launcher="python")

FSDP = BackendSpec(
    name="fsdp",
    help="FSDP2",
    # 0 replicates; 2 gathers the weights once a step and keeps them to its end; 3 frees them after each use.
    stages=(0, 2, 3),
    default_stage=3,
    cut_from={OPTIMIZER_STATE: 1, GRADIENTS: 2, WEIGHTS: 2},
    offloads={"all": (3,)},
    offload_rule="offloads parameters and optimizer state together, at stage 3: use --offload all --zero_stage 3",
    replicates_shards=True,
    shard_size_stages=(2, 3),
    shard_size_rule="cuts states at stages 2 and 3 only: use --zero_stage 2 or 3",
)

DEEPSPEED = BackendSpec(
    name="deepspeed",
    help="ZeRO",
    stages=(0, 1, 2, 3),
    default_stage=2,
    flat_from=1,
    offloads={"optimizer": (1, 2, 3), "all": (3,)},
    offload_rule=(
        "offloads the optimizer's state from stage 1 on, and parameters at stage 3 only: use --offload optimizer with "
        "--zero_stage 1, 2 or 3, or --offload all with --zero_stage 3"
    ),
    shard_size_stages=(3,),
    shard_size_offloads=("none", "optimizer"),
    shard_size_rule=(
        "keeps a second copy of the weights on the device, at stage 3 (ZeRO++'s hpZ): use --zero_stage 3 with --offload none "
        "or optimizer, or --backend fsdp"
    ),
    launcher="deepspeed",
    package="deepspeed",
)

BACKENDS = {spec.name: spec for spec in (PLAIN, FSDP, DEEPSPEED)}
"""Name → the specification of the backend, the simplest first."""


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def _sizes_near(shards: int, ranks: int) -> str:
    """The values of ``shard_size`` to use instead of one that does not divide the ranks, in words."""
    sizes = [size for size in range(2, ranks + 1) if ranks % size == 0]
    near = [*[size for size in sizes if size < shards][-1:], *[size for size in sizes if size > shards][:1]]
    return " or ".join([*map(str, near), "none (all ranks)"])


def backend_help() -> str:
    """The help text of ``--backend``."""
    return "; ".join(f"{spec.name}: {spec.help}" for spec in BACKENDS.values()) + "; auto: the fastest that fits"


def stage_help() -> str:
    """The help text of ``--zero_stage``."""
    defaults = ", ".join(f"{spec.default_stage} for {spec.name}" for spec in BACKENDS.values() if spec.has_stages)
    return (
        "what is sharded: 0: nothing; 1: optimizer state; 2: gradients too; 3: parameters too; "
        f"none: {defaults}; auto: the fastest that fits"
    )
