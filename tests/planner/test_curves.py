"""Memory over micro batch: the plan's own point is the plan, and every other is what it would be."""

import json
from pathlib import Path

import pytest

from scalegpt.config.machine import MachineConfig
from scalegpt.config.train import RECOMPUTE
from scalegpt.hardware.machine import Machine
from scalegpt.planner.query import Answer, Asked, answer
from scalegpt.planner.search.curves import memory_curves


def _given(preset: str = "150M_1024", gpus: int = 1, **flags: object) -> Answer:
    machine = Machine.of(MachineConfig(gpu="4090", gpus=gpus))
    return answer(Asked.of(preset=preset, config_file=None, flags=flags, machine=machine), explain=False)


@pytest.mark.parametrize("flags", [{}, {"micro_batch": 4, "recompute": "full"}, {"gpus": 8}])
def test_the_plan_lies_on_its_curve(flags: dict[str, object]) -> None:
    given = _given(**flags)  # type: ignore[arg-type]
    plan, curves = given.choice, memory_curves(given.question, given.choice)
    assert tuple(curves) == RECOMPUTE
    assert curves[plan.run.train.recompute][plan.batch.micro_batch] == plan
    for curve in curves.values():
        assert list(curve) == sorted(curve)
        assert {other.batch.tokens for other in curve.values()} == {plan.batch.tokens}
        assert {other.run.parallel for other in curve.values()} == {plan.run.parallel}
        totals = [other.total_bytes for other in curve.values()][:-1]  # the last has no gradients that wait
        assert totals == sorted(totals)
    for light, heavy in zip(curves["none"].values(), curves["full"].values(), strict=True):
        assert heavy.total_bytes <= light.total_bytes


def test_without_tokens_per_step_the_micro_batch_is_the_step() -> None:
    given = _given("tiny", micro_batch=6, tokens_per_step=None)
    curves = memory_curves(given.question, given.choice)
    assert [list(curve) for curve in curves.values()] == [[1, 2, 3, 6]] * 3


def test_what_a_deepspeed_file_forbids_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text(json.dumps({
        "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}, "bf16": {"enabled": True},
    }))  # fmt: skip
    given = _given(
        "150M_1024", gpus=2, backend="deepspeed", zero_stage=2, ds_config=str(file), micro_batch=4, offload="none"
    )
    curves = memory_curves(given.question, given.choice)
    assert [list(curve) for curve in curves.values()] == [[4]] * 3
