"""What ranks really hand to their collectives in a step, beside what the planner says that they send."""

from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from plans import block_parameters
from ranks import run_ranks
from scalegpt.config.backends import Mesh
from scalegpt.config.presets import resolve
from scalegpt.config.run import RunConfig
from scalegpt.planner.time.communication import ALL, REPLICAS, SHARDS, collectives, sent_bytes
from scalegpt.units import BYTES

WORKER = Path(__file__).parent / "volume_worker.py"
SHAPE = {
    "n_layer": 6, "n_embd": 64, "n_head": 4, "vocab_size": 251, "block_size": 32, "bias": True, "micro_batch": 2,
    "recompute": "none",
}  # fmt: skip
VARIANTS = (("bf16", 1), ("fp32", 2))


def layouts(ranks: int) -> dict[str, dict[str, Any]]:
    """The layouts of this number of ranks, by name: backend, stage and mesh, each with and without accumulation."""
    stages = {"fsdp": (0, 2, 3), "deepspeed": (0, 1, 2, 3)}
    flags: dict[str, Any] = {f"{name} {stage}": (name, stage, {}) for name in stages for stage in stages[name]}
    if ranks == 4:
        flags = {f"fsdp {stage}, 2 x 2": ("fsdp", stage, {"shard_size": 2}) for stage in (2, 3)}
        flags["fsdp 3, 2 x 2, offload"] = ("fsdp", 3, {"shard_size": 2, "offload": "all"})
        flags["deepspeed 3, second copy"] = ("deepspeed", 3, {"shard_size": 2})
        flags["fsdp 3, 2 x 2, muon"] = ("fsdp", 3, {"shard_size": 2, "optimizer": "muon"})
    return {
        f"{label}, {precision}, accumulation {accum}": {
            "flags": {**SHAPE, "backend": backend, "zero_stage": stage, "precision": precision, **more},
            "grad_accum": accum,
        }
        for label, (backend, stage, more) in flags.items()
        for precision, accum in VARIANTS
    }


ALL_LAYOUTS = {ranks: layouts(ranks) for ranks in (2, 3, 4)}
CASES = [(ranks, label) for ranks, each in ALL_LAYOUTS.items() for label in each]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Any]:
    return cache(lambda ranks: run_ranks(WORKER, ranks, ALL_LAYOUTS[ranks], tmp_path_factory.mktemp("volume")))


def who(over: str, mesh: Mesh) -> list[int]:
    """The ranks that take part in rank 0's collective."""
    near = range(mesh.copy_over or mesh.shards)
    return list({ALL: range(mesh.ranks), SHARDS: near, REPLICAS: range(0, mesh.ranks, mesh.shards)}[over])


@pytest.mark.slow
@pytest.mark.xdist_group("communication")  # one process measures for all of them
@pytest.mark.parametrize(("ranks", "label"), CASES)
def test_the_volume_is_the_planners(measured: Callable[[int], Any], ranks: int, label: str) -> None:
    case = ALL_LAYOUTS[ranks][label]
    run, accum, found = resolve(flags=case["flags"]), case["grad_accum"], measured(ranks)[label]
    mesh, sent = run.parallel.mesh(ranks), 0.0
    expected: dict[str, int] = defaultdict(int)
    for each in collectives(run, mesh):
        expected[f"{each.kind} {who(each.over, mesh)}"] += each.size * each.times(accum)
    assert found.keys() == expected.keys()
    for kind, size in expected.items():
        assert found[kind] == pytest.approx(size, rel=0.001, abs=off_by(run, accum)), kind
        members = kind.count(",") + 1
        factor = {"all_reduce": 2.0, "all_to_all": 1 / members}.get(kind.split()[0], 1.0)
        sent += factor * found[kind] * (members - 1) / members
    assert sent == pytest.approx(sent_bytes(run, ranks=ranks, grad_accum=accum), rel=0.001, abs=off_by(run, accum))


def off_by(run: RunConfig, accum: int) -> float:
    """With accumulation ZeRO-3 gathers up to a block more in each micro step than the order of its modules asks for."""
    if (run.parallel.backend, run.parallel.stage) != ("deepspeed", 3) or accum == 1:
        return 0.0
    return accum * BYTES[run.train.precision] * block_parameters(run.model)
