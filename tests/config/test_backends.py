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
    for spec in (FSDP, DEEPSPEED):
        with pytest.raises(InputError, match=f"backend {spec.name} cannot run 2 replicas of 4 shards; use one replica"):
            spec.check_mesh(Mesh(2, 4))
    with pytest.raises(
        InputError, match="backend plain runs in one process, not 2; use --backend fsdp or --backend deepspeed"
    ):
        PLAIN.check_mesh(Mesh(2, 1))


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
