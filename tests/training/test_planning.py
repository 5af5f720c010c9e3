"""What the planner chooses for a run that starts, and the line with which it refuses one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scalegpt.backends import World
from scalegpt.config.presets import resolve
from scalegpt.config.run import PLANNED, PLANNED_BY_DEFAULT
from scalegpt.errors import InputError
from scalegpt.hardware import detect
from scalegpt.hardware.gpus import find_card
from scalegpt.hardware.machine import Machine
from scalegpt.planner.search.question import Question
from scalegpt.planner.time.calibration import Calibration
from scalegpt.training import memory
from scalegpt.training.memory import predicted_line
from scalegpt.training.request import Request
from scalegpt.training.setup import planning
from scalegpt.training.setup.planning import Planned, _choose, choose_layout

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def settled(
    preset: str, gpu: str, *, gpus: int = 1, open_: Any = PLANNED_BY_DEFAULT, margin: float = 0.03, **flags: Any
) -> Planned:
    run = resolve(preset=preset, flags={"precision": "bf16", **flags})
    machine = Machine.with_card(find_card(gpu), gpus=gpus)
    return _choose(Question(run, machine, frozenset(open_), margin, Calibration(), fewer=False), ())


def test_the_micro_batch_is_the_largest_that_fits_and_the_presets_layout_holds() -> None:
    chosen = settled("350M_1024", "a100-40gb", gpus=8)
    assert (chosen.run.parallel.backend, chosen.run.parallel.stage) == ("deepspeed", 2)
    assert chosen.batch.tokens == 393_216
    larger = settled("350M_1024", "a100-80gb", gpus=8)
    assert larger.batch.micro_batch > chosen.batch.micro_batch
    assert any("the fastest that fits" in note for note in chosen.notes)


def test_a_presets_claim_holds_by_recompute() -> None:
    """Batch 24 of 150M_1024 on a card of 12 GB."""
    chosen = settled("150M_1024", "3060", open_={"recompute"}, backend="plain", micro_batch=24)
    assert (chosen.batch.micro_batch, chosen.run.train.recompute) == (24, "selective")
    assert chosen.plan.fits


def test_what_is_fixed_stays_even_where_it_does_not_fit() -> None:
    fixed = {"open_": (), "backend": "plain", "recompute": "none"}
    chosen = settled("150M_1024", "3060", **fixed, micro_batch=24, loss_chunk=64)
    assert chosen.plan.fits is False
    assert "warning" in predicted_line(chosen.plan)
    assert chosen.batch.micro_batch == 24
    with pytest.raises(InputError, match=r"150M_1024 does not fit with recompute none: RTX 3060 has 11\.75 GiB"):
        settled("150M_1024", "3060", **fixed, micro_batch=32)


def test_everything_open_finds_what_the_presets_layout_cannot() -> None:
    with pytest.raises(InputError) as caught:
        settled("500M_1024", "2060", backend="plain")
    line = str(caught.value)
    assert "500M_1024 does not fit" in line
    assert "RTX 2060 has 5.79 GiB" in line
    assert "use --" in line or "run it on" in line
    assert "\n" not in line
    chosen = settled("500M_1024", "2060", open_=PLANNED)
    assert chosen.plan.fits
    assert chosen.run.parallel.offload != "none"


def test_the_margin_gives_way_before_the_run_does() -> None:
    run = {"backend": "plain", "micro_batch": 24, "recompute": "selective"}
    exact = settled("150M_1024", "3060", open_=(), **run).plan.total_bytes
    card = replace(find_card("3060"), gib=(exact + 2**20) / 2**30)
    asked = resolve(preset="150M_1024", flags={"precision": "bf16", **run})
    question = Question(asked, Machine.with_card(card), frozenset({"recompute"}), 0.03, Calibration(), fewer=False)
    question = replace(question, open=frozenset({"loss"}))
    chosen = _choose(question, ())
    assert chosen.plan.fits
    assert any("safety margin of 3%" in note for note in chosen.notes)


def test_a_processor_takes_the_micro_batch_as_it_is() -> None:
    run = resolve(preset="tiny", flags={"precision": "fp32", "backend": "plain"})
    chosen = choose_layout(run, ALONE, open_=PLANNED_BY_DEFAULT, margin=0.03)
    assert (chosen.batch.micro_batch, chosen.run.train.recompute, chosen.notes) == (8, "none", ())


def test_memory_that_is_short_on_a_processor_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    monkeypatch.setattr(planning, "give_back_freed_memory", lambda: given.append(True))
    run = resolve(preset="small", flags={"precision": "fp32", "backend": "plain", "max_tokens": 10**9})
    ample = choose_layout(run, ALONE, open_=frozenset({"recompute"}), margin=0.03)
    assert given == []
    shares = iter((0.9, 0.8, 0.01))

    def short() -> Planned:
        room = int(ample.plan.total_bytes * next(shares))
        monkeypatch.setattr(detect, "available_bytes", lambda root: room)
        monkeypatch.setattr(memory, "own_bytes", lambda: 0)
        return choose_layout(run, ALONE, open_=frozenset({"recompute"}), margin=0.0)

    first, second = short(), short()
    assert given == [True, True]
    assert any("freed memory is returned to the system" in note for note in first.notes)
    assert first.batch.tokens == second.batch.tokens == ample.batch.tokens
    assert not second.run.train.async_checkpoint
    assert second.plan.total_bytes <= second.plan.machine.usable_bytes  # type: ignore[operator]
    with pytest.raises(InputError, match=r"small does not fit: .* of memory available"):
        short()


def test_a_resumed_run_chooses_anew_where_memory_has_become_short(monkeypatch: pytest.MonkeyPatch) -> None:
    run = resolve(
        preset="small", flags={"precision": "fp32", "backend": "plain", "micro_batch": 8, "recompute": "none"}
    )
    before = choose_layout(run, ALONE, open_=frozenset(), margin=0.0).plan
    monkeypatch.setattr(detect, "available_bytes", lambda root: int(before.total_bytes * 0.65))
    monkeypatch.setattr(memory, "own_bytes", lambda: 0)
    with pytest.raises(InputError, match="small does not fit"):
        choose_layout(run, ALONE, open_=frozenset(), margin=0.0)
    again = choose_layout(run, ALONE, open_=frozenset(), margin=0.0, reopen=PLANNED_BY_DEFAULT)
    assert again.plan.fits
    assert again.batch.tokens == before.batch.tokens


def test_offload_beyond_the_hosts_memory_is_refused() -> None:
    fixed = {"backend": "deepspeed", "zero_stage": 3, "offload": "all", "micro_batch": 1, "recompute": "full"}
    run = resolve(preset="500M_1024", flags={"precision": "bf16", **fixed})
    machine = replace(Machine.with_card(find_card("a100-40gb")), host_bytes=4 * 10**9, host_source="found")
    question = Question(run, machine, frozenset(), 0.03, Calibration(), fewer=False)
    with pytest.raises(InputError, match=r"offload needs .* of host memory in each machine, of 3\.73 GiB available; "):
        _choose(question, ())


def test_a_model_beyond_the_hosts_memory_is_refused() -> None:
    huge = {"n_layer": 400, "n_embd": 16384, "n_head": 128, "precision": "fp32", "backend": "plain"}
    with pytest.raises(InputError, match="does not fit"):
        choose_layout(resolve(flags=huge), ALONE, open_=PLANNED_BY_DEFAULT, margin=0.03)


def test_nothing_is_left_auto() -> None:
    run = resolve(
        preset="tiny", flags={"micro_batch": "auto", "backend": "auto", "recompute": "auto", "precision": "fp32"}
    )
    assert run.auto == {"micro_batch", "backend", "recompute"}
    request = Request(run, Path("runs"), fresh=False, given=frozenset({"micro_batch", "backend", "recompute"}))
    assert request.open == {"micro_batch", "backend", "recompute", "zero_stage", "shard_size"}
    chosen = choose_layout(run, ALONE, open_=request.open, margin=0.03)
    assert chosen.run.auto == frozenset()
    assert chosen.run.parallel.backend == "plain"
