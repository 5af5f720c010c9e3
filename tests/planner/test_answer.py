"""From what is asked to what is answered: what stays fixed, what is remarked on, and the tables."""

from dataclasses import replace
from typing import Any

import pytest

from scalegpt.architecture.counting import count_parameters
from scalegpt.config.presets import preset_names
from scalegpt.config.run import PLANNED
from scalegpt.errors import InputError
from scalegpt.hardware.gpus import GB, catalogue, find_card
from scalegpt.hardware.machine import Machine
from scalegpt.planner.query import Answer, Asked, answer
from scalegpt.planner.tables import largest, over_cards, over_presets
from scalegpt.planner.time.calibration import Calibration


def card(name: str = "a100-40gb", *, gpus: int = 1, nodes: int = 1, **known: Any) -> Machine:
    return replace(Machine.with_card(find_card(name), gpus=gpus, nodes=nodes), **known)


def asked(
    preset: str | None = "150M_1024", machine: Machine | None = None, margin: float = 0.03, **flags: Any
) -> Asked:
    return Asked.of(preset=preset, config_file=None, flags=flags, machine=machine or card(), margin=margin)


def given(*words: Any, **more: Any) -> Answer:
    return answer(asked(*words, **more), explain=False)


# --- what is fixed ---------------------------------------------------------------------------------------------------


def test_what_a_flag_says_is_fixed_and_auto_is_not() -> None:
    assert asked().fixed == frozenset()
    assert asked(recompute="full", micro_batch="auto").fixed == {"recompute"}
    question, _ = asked(recompute="full", micro_batch="auto").question()
    assert question.open == PLANNED - {"recompute", "shard_size"}


def test_the_shard_size_is_chosen_on_several_machines_only() -> None:
    several = card(gpus=8, nodes=2)
    assert asked(machine=several).question()[0].open == PLANNED
    assert asked(machine=several, shard_size=8, backend="fsdp").question()[0].open == PLANNED - {
        "shard_size",
        "backend",
    }
    assert "shard_size" not in asked(machine=card(gpus=8)).question()[0].open


def test_a_deepspeed_file_fixes_what_it_is_for() -> None:
    with_file = asked(backend="deepspeed", zero_stage=2, ds_config="zero2.json", machine=card(gpus=4))
    assert with_file.fixed >= {"backend", "zero_stage", "offload"}


def test_a_stage_may_ask_for_another_backend_than_the_presets() -> None:
    """FSDP2 has no stage 1."""
    plan = given(zero_stage=1, machine=card(gpus=4)).choice
    assert (plan.run.parallel.backend, plan.run.parallel.stage) == ("deepspeed", 1)
    with pytest.raises(InputError, match="zero_stage"):
        asked(zero_stage=1, backend="fsdp", machine=card(gpus=4))


def test_with_all_fixed_it_is_only_predicted() -> None:
    fixed = {
        "backend": "plain",
        "zero_stage": 0,
        "offload": "none",
        "micro_batch": 1,
        "recompute": "none",
        "loss": "full",
    }
    got = answer(asked(**fixed))
    assert not got.question.open
    assert (got.choice.batch.micro_batch, got.choice.run.train.recompute, got.alternatives) == (1, "none", ())


def test_an_unknown_machine_gets_the_run_as_it_stands() -> None:
    got = answer(asked("tiny", Machine()))
    assert got.choice.fits is None
    assert got.alternatives == got.remedies == ()
    assert got.as_dict()["choice"]["tokens_per_second"] is None


# --- what is remarked on ---------------------------------------------------------------------------------------------


def test_a_plan_that_fits_only_without_the_margin_says_so() -> None:
    fixed = {"micro_batch": 8, "recompute": "none", "loss": "full"}
    total = given(**fixed).choice.total_bytes
    tight = given(**fixed, machine=card(usable_bytes=int(total * 1.01)), offload="none")
    assert tight.choice.fits
    assert any("without the safety margin of 3%" in note for note in tight.notes)
    roomy = given(**fixed, machine=card(usable_bytes=int(total * 1.04)), offload="none")
    assert not any("margin" in note for note in roomy.notes)


def test_cards_that_are_left_out_are_mentioned() -> None:
    got = given("demo", card(gpus=8, nodes=8, network_gbps=1))
    used = got.choice.machine.ranks
    assert used < 64
    assert any(note.startswith(f"{used} of the 64 GPUs") for note in got.notes)


def test_an_assumed_network_and_an_estimated_memory_are_mentioned() -> None:
    assert any("Gbit/s for each machine is assumed" in note for note in given(machine=card(gpus=8, nodes=2)).notes)
    assert not any("assumed" in note for note in given(machine=card(gpus=8, nodes=2, network_gbps=100)).notes)
    estimated = next(each for each in catalogue() if each.is_estimated)
    assert any("is estimated" in note for note in given("tiny", card(estimated.name)).notes)


# --- as JSON ---------------------------------------------------------------------------------------------------------


def test_the_object_says_where_what_fits_comes_from() -> None:
    none = answer(asked("500M_1024", card(usable_bytes=GB), offload="none", recompute="none"))
    said = none.as_dict()
    assert said["choice"]["fits"] is False
    assert said["choice"]["missing_bytes"] == said["choice"]["total_bytes"] - GB
    assert said["would_fit"]["fits"] is True
    assert [each["what"] for each in said["remedies"]] == [each.what for each in none.remedies]
    assert said["alternatives"] == []


def test_speeds_belong_together() -> None:
    choice = answer(asked(machine=card(gpus=4)), explain=False).as_dict()["choice"]
    assert choice["tokens_per_second"] * choice["step_seconds"] == pytest.approx(choice["tokens_per_step"])
    assert sum(choice["time"].values()) == pytest.approx(choice["step_seconds"])
    assert sum(choice["breakdown"].values()) == choice["peak_bytes"] == max(choice["phases"].values())
    assert choice["peak_bytes"] + sum(choice["overheads"].values()) == choice["total_bytes"]
    assert 0 < choice["mfu"] < 1


# --- tables ----------------------------------------------------------------------------------------------------------


def test_every_preset_is_in_the_table_once_the_smallest_first() -> None:
    rows = over_presets(card("rtx3060"), {}, Calibration())
    assert sorted(row.name for row in rows) == sorted(preset_names())
    sizes = [count_parameters(row.run.model).total for row in rows]
    assert sizes == sorted(sizes)
    best = largest(rows, without_offload=True)
    assert best is not None
    assert best.fits
    bigger = [row for row in rows if count_parameters(row.run.model).total > count_parameters(best.run.model).total]
    assert all(not row.fits or row.offloads for row in bigger)
    for row in bigger:
        assert not answer(asked(row.name, card("rtx3060"), offload="none"), explain=False).choice.fits


def test_what_fits_without_offload_is_not_only_what_is_chosen_without_it() -> None:
    rows = over_presets(card("rtx3060"), {}, Calibration())
    chosen_with_it = [row for row in rows if row.offloads and row.fits_without_offload]
    assert chosen_with_it, "a preset for which offload is the faster of two that fit"
    for row in chosen_with_it:
        assert answer(asked(row.name, card("rtx3060"), offload="none"), explain=False).choice.fits


def test_every_card_is_in_the_table_once_the_smallest_memory_first() -> None:
    rows = over_cards(asked(machine=Machine(gpus=2)))
    assert sorted(row.name for row in rows) == sorted(each.name for each in catalogue())
    memory = [row.asked.machine.usable_bytes or 0 for row in rows if row.plan]
    assert memory == sorted(memory)
    assert {row.asked.machine.gpus for row in rows if row.plan} <= {1, 2}


def test_a_row_is_what_the_question_alone_would_answer() -> None:
    for row in over_presets(card("4090", gpus=2), {"recompute": "full"}, Calibration()):
        alone = answer(asked(row.name, card("4090", gpus=2), recompute="full"), explain=False)
        assert row.plan is not None
        assert row.as_dict()["choice"] == alone.as_dict()["choice"]


def test_a_card_that_cannot_do_what_is_fixed_says_why() -> None:
    rows = {row.name: row for row in over_cards(asked(machine=Machine(gpus=1), precision="bf16"))}
    assert rows["T4"].plan is None
    assert "no bf16" in (rows["T4"].why_not or "")
    assert rows["T4"].as_dict()["choice"] is None
    assert rows["A100 80GB"].fits
    assert largest([rows["T4"]]) is None


def test_presets_that_do_not_exist_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean"):
        asked("150M_1025")
