"""What the backends are: meshes, offloads, and what is refused."""

import pytest

from scalegpt.config import ParallelConfig
from scalegpt.config.backends import BACKENDS, DEEPSPEED, FSDP, GRADIENTS, OPTIMIZER_STATE, PLAIN, WEIGHTS, Mesh
from scalegpt.errors import InputError


def test_a_mesh_is_replicas_of_shards() -> None:
    mesh = Mesh(2, 4)
    assert mesh.ranks == 8
    assert [mesh.place(rank) for rank in range(8)] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]


@pytest.mark.parametrize("name", BACKENDS)
def test_a_stage_shards_or_replicates(name: str) -> None:
    spec = BACKENDS[name]
    for stage in spec.stages:
        assert spec.mesh(stage, 8) == (Mesh(8, 1) if stage == 0 else Mesh(1, 8))
        assert ParallelConfig(backend=name, zero_stage=stage).mesh(8) == spec.mesh(stage, 8)
        assert spec.mesh(stage, 1) == Mesh(1, 1)


def test_what_is_cut() -> None:
    states = (OPTIMIZER_STATE, GRADIENTS, WEIGHTS)
    cut = {
        spec.name: [sum(spec.cuts(state, stage) for state in states) for stage in spec.stages]
        for spec in (FSDP, DEEPSPEED)
    }
    assert cut == {"fsdp": [0, 3, 3], "deepspeed": [0, 1, 2, 3]}


def test_meshes_that_no_backend_runs_are_refused() -> None:
    for mesh in (Mesh(1, 1), Mesh(8, 1), Mesh(1, 8)):
        FSDP.check_mesh(mesh)
        DEEPSPEED.check_mesh(mesh)
    FSDP.check_mesh(Mesh(2, 4))
    with pytest.raises(InputError, match="backend deepspeed cannot run 2 replicas of 4 shards; use one replica"):
        DEEPSPEED.check_mesh(Mesh(2, 4))
    with pytest.raises(
        InputError, match="backend plain runs in one process, not 2; use --backend fsdp or --backend deepspeed"
    ):
        PLAIN.check_mesh(Mesh(2, 1))


@pytest.mark.parametrize("stage", FSDP.shard_size_stages)
def test_a_shard_size_makes_the_other_ranks_replicas(stage: int) -> None:
    parallel = ParallelConfig(backend="fsdp", zero_stage=stage, shard_size=4)
    assert [parallel.mesh(ranks) for ranks in (4, 8, 1024)] == [Mesh(1, 4), Mesh(2, 4), Mesh(256, 4)]
    assert parallel.label() == f"fsdp stage {stage}, shard size 4"


def test_deepspeeds_shard_size_is_that_of_a_second_copy() -> None:
    parallel = ParallelConfig(backend="deepspeed", zero_stage=3, shard_size=4)
    assert [parallel.mesh(ranks) for ranks in (4, 8)] == [Mesh(1, 4), Mesh(1, 8, 4)]
    with pytest.raises(InputError, match="on the device, at stage 3"):
        ParallelConfig(backend="deepspeed", zero_stage=3, shard_size=4, offload="all")


@pytest.mark.parametrize(
    ("shard_size", "ranks", "message"),
    [
        (3, 8, "shard_size 3 does not divide 8 ranks; use 2 or 4 or none \\(all ranks\\)"),
        (5, 9, "use 3 or 9 or none"),
        (16, 8, "use 8 or none"),
        (2, 7, "use 7 or none"),
        (2, 1, "shard_size 2 does not divide 1 rank; use none"),
    ],
)
def test_a_shard_size_that_does_not_divide_the_ranks_is_refused(shard_size: int, ranks: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ParallelConfig(backend="fsdp", shard_size=shard_size).mesh(ranks)


@pytest.mark.parametrize(
    ("backend", "stage", "message"),
    [
        ("plain", 0, "shard_size 8 needs backend fsdp or deepspeed, not plain; or use --shard_size none"),
        (
            "fsdp",
            0,
            "shard_size 8: fsdp cuts states at stages 2 and 3 only: use --zero_stage 2 or 3; or use --shard_size",
        ),
        ("deepspeed", 1, "shard_size 8: deepspeed keeps a second copy of the weights on the device, at stage 3"),
        (
            "deepspeed",
            2,
            "use --zero_stage 3 with --offload none or optimizer, or --backend fsdp; or use --shard_size none",
        ),
    ],
)
def test_shard_sizes_that_a_stage_lacks_are_refused(backend: str, stage: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ParallelConfig(backend=backend, zero_stage=stage, shard_size=8)


@pytest.mark.parametrize(
    ("backend", "stage", "offload", "message"),
    [
        ("plain", 0, "all", "offload all needs backend fsdp or deepspeed, not plain"),
        ("fsdp", 3, "optimizer", "at stage 3: use --offload all --zero_stage 3"),
        ("fsdp", 2, "all", "at stage 3: use --offload all --zero_stage 3"),
        ("deepspeed", 0, "optimizer", "from stage 1 on"),
        ("deepspeed", 2, "all", "parameters at stage 3 only"),
    ],
)
def test_offloads_that_a_backend_lacks_are_refused(backend: str, stage: int, offload: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ParallelConfig(backend=backend, zero_stage=stage, offload=offload)


def test_labels() -> None:
    assert ParallelConfig().label() == "plain"
    assert ParallelConfig(backend="fsdp").label() == "fsdp stage 3"
    assert ParallelConfig(backend="deepspeed", zero_stage=1).label("ZeRO-") == "deepspeed ZeRO-1"


@pytest.mark.parametrize(
    ("backend", "gpus", "machines", "words"),
    [
        ("plain", 1, 1, "python"),
        ("fsdp", 1, 1, "python"),
        ("fsdp", 8, 1, "torchrun --nproc_per_node 8"),
        ("deepspeed", 8, 1, "deepspeed --num_gpus 8"),
        (
            "deepspeed",
            8,
            2,
            "torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint FIRST_MACHINE:29500",
        ),
    ],
)
def test_launchers(backend: str, gpus: int, machines: int, words: str) -> None:
    assert BACKENDS[backend].launch(gpus, machines) == words.split()
