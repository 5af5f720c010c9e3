"""What two ranks really hand to their collectives in a step, beside what the planner says that they send."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from plans import block_parameters
from ranks import run_ranks
from scalegpt.config.presets import resolve
from scalegpt.config.run import RunConfig
from scalegpt.planner.time.communication import EVERY, collectives, sent_bytes
from scalegpt.units import BYTES

WORKER = Path(__file__).parent / "volume_worker.py"
RANKS = 2
SHAPE = {
    "n_layer": 6, "n_embd": 64, "n_head": 4, "vocab_size": 251, "block_size": 32, "bias": True, "micro_batch": 2,
    "recompute": "none",
}  # fmt: skip
LAYOUTS = {
    f"{backend} {stage}, {precision}, accumulation {accum}": {
        "flags": {**SHAPE, "backend": backend, "zero_stage": stage, "precision": precision}, "grad_accum": accum,
    }
    for backend, stages in (("fsdp", (0, 2, 3)), ("deepspeed", (0, 1, 2, 3)))
    for stage in stages
    for precision, accum in (("bf16", 1), ("fp32", 2))
}  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_ranks(WORKER, RANKS, LAYOUTS, tmp_path_factory.mktemp("volume"))


@pytest.mark.slow
@pytest.mark.xdist_group("communication")  # one process measures for all of them
@pytest.mark.parametrize("label", LAYOUTS)
def test_the_volume_is_the_planners(measured: Any, label: str) -> None:
    run, accum = resolve(flags=LAYOUTS[label]["flags"]), LAYOUTS[label]["grad_accum"]
    expected: dict[str, int] = defaultdict(int)
    for each in collectives(run, run.parallel.mesh(RANKS)):
        expected[each.kind] += each.size * (accum if each.when == EVERY else 1)
    assert measured[label].keys() == expected.keys()
    for kind, size in expected.items():
        assert measured[label][kind] == pytest.approx(size, rel=0.001, abs=off_by(run, accum)), kind
    sent = sum((2 if kind == "all_reduce" else 1) * size / 2 for kind, size in measured[label].items())
    assert sent == pytest.approx(sent_bytes(run, ranks=RANKS, grad_accum=accum), rel=0.001, abs=off_by(run, accum))


def off_by(run: RunConfig, accum: int) -> float:
    """With accumulation ZeRO-3 gathers up to a block more in each micro step than the order of its modules asks for."""
    if (run.parallel.backend, run.parallel.stage) != ("deepspeed", 3) or accum == 1:
        return 0.0
    return accum * BYTES[run.train.precision] * block_parameters(run.model)
