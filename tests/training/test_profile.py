"""``--profile``: the trace has the steps asked for and no others, and each operator counts for the right part."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from scalegpt.architecture.operations import ATTENTION, ELEMENTWISE, MATMULS
from scalegpt.config import TrainConfig
from scalegpt.errors import InputError
from scalegpt.planner.time.step_time import LAUNCHES
from scalegpt.planner.time.work import LOSS, OPTIMIZER
from scalegpt.training.profile.operators import operators, table

FLAGS = {
    "tokenizer": "byte", "n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 16, "micro_batch": 4, "precision": "fp32",
    "sample_tokens": 0, "eval_every": 0, "eval_tokens": 100, "model_name": "run", "device": "cpu", "compile": "off",
}  # fmt: skip


@pytest.fixture
def train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., str], one_thread: None
) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text("abcdefgh\n" * 200)
    flags = [f"--{key}={value}" for key, value in FLAGS.items()]
    return lambda words, status=0: call("train", "--input_file", "text.txt", *flags, *words.split(), status=status)


def steps_in(trace: Path) -> int:
    """The number of optimizer steps that a trace shows."""
    events = json.loads(trace.read_text())["traceEvents"]
    return sum(event.get("name", "").startswith("Optimizer.step") for event in events)


def test_the_steps_asked_for_are_recorded(train: Callable[..., str]) -> None:
    said = train("--max_iters 6 --profile 2:4")
    (trace,) = Path("runs/run/profile").iterdir()
    assert trace.name == "steps_2_4_rank_0.json"
    assert steps_in(trace) == 3
    assert f"profile  {trace}" in said
    shown = said.partition("operator  ")[2].partition("\n\n")
    assert len(shown[0].splitlines()) == 11
    assert [line[:44].strip() for line in shown[2].splitlines()[1:8]] == [
        "matmuls, recompute", "attention", "loss", "norms and other elementwise", "optimizer",
        "waiting, and time outside of operators", "whole step, with the recorder",
    ]  # fmt: skip


def test_a_resumed_run_records_what_is_left(train: Callable[..., str]) -> None:
    train("--max_iters 3")
    assert "profile  of steps 2:9 steps 4 to 5 are recorded" in train("--max_iters 5 --profile 2:9")
    (trace,) = Path("runs/run/profile").iterdir()
    assert (trace.name, steps_in(trace)) == ("steps_4_5_rank_0.json", 2)
    assert "profile  of steps 2:3 none is recorded" in train("--max_iters 6 --profile 2:3")
    assert len(list(Path("runs/run/profile").iterdir())) == 1


def test_a_trace_that_cannot_be_written_ends_no_run(train: Callable[..., str]) -> None:
    train("--max_iters 1")
    Path("runs/run/profile").write_text("in the way")
    said = train("--max_iters 3 --profile 2")
    assert "warning: the profile was not written" in said
    assert json.loads(Path("runs/run/run_status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--max_iters 3 --profile 4:5", "profile 4:5: the run has 3 steps; give steps among them"),
        ("--profile 5:4", "profile 5:4 names no step"),
        ("--profile first", "profile must be A or A:B with whole numbers from 1 on, for example 100:120, not 'first'"),
    ],
)
def test_steps_that_no_run_has_are_refused(words: str, said: str, train: Callable[..., str]) -> None:
    error = train(words, status=2)
    assert said in error
    assert error.count("\n") == 1
    assert not Path("runs/run/config.yaml").exists()


def test_the_setting_is_checked_when_it_is_made() -> None:
    assert TrainConfig(profile="3:5").profiled_steps == (3, 5)
    assert TrainConfig(profile="7").profiled_steps == (7, 7)
    assert TrainConfig().profiled_steps is None
    with pytest.raises(InputError, match="profile 0:1 names no step"):
        TrainConfig(profile="0:1")


def test_an_operator_counts_for_what_is_around_it() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    q = torch.randn(1, 2, 64, 32)
    adam = torch.optim.AdamW([x], fused=True)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        y = x @ x
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
        with record_function("_ChunkedCrossEntropy"):
            y = y @ x
        torch.nn.functional.gelu(y).sum().backward()
        adam.step()
    found = {(each.name, each.part): each for each in operators(recorded.events(), on_card=False)}
    assert found["aten::mm", LOSS].calls == 1
    assert found["aten::mm", MATMULS].calls == 1 + 4  # the first, and both backward
    assert ("aten::gelu", ELEMENTWISE) in found
    assert any(part == ATTENTION and "attention" in name for name, part in found)
    assert any(part == OPTIMIZER and "adamw" in name for name, part in found)
    assert sum(each.seconds for each in found.values()) > 0
    dearest = operators(recorded.events(), on_card=False)
    assert [each.seconds for each in dearest] == sorted((each.seconds for each in dearest), reverse=True)


def test_measured_and_predicted_stand_side_by_side() -> None:
    x = torch.randn(64, 64)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        x @ x
    found = operators(recorded.events(), on_card=False)
    lines = table(found, 1, 1.0, {MATMULS: 0.25, LAUNCHES: 0.5}).splitlines()
    assert next(line.split()[-1] for line in lines if line.startswith("matmuls")) == "250.000"
    assert next(line.split()[-1] for line in lines if line.startswith("waiting")) == "500.000"
    assert lines[-1].split()[-2:] == ["1000.000", "750.000"]
    unknown = table(found, 1, 1.0, None).splitlines()
    assert unknown[-2].split()[-1] == "-"
    assert "no rates of this device" in unknown[-1]
