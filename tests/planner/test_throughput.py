"""The time of a step holds to arithmetic that can be done by hand, and to what physics allows."""

import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from plans import draw_machine, draw_run, space
from scalegpt.config import RunConfig
from scalegpt.config.backends import Mesh
from scalegpt.config.presets import resolve
from scalegpt.hardware.gpus import find_card
from scalegpt.hardware.machine import Machine
from scalegpt.planner.plan import Estimator
from scalegpt.planner.time.communication import collectives, sent_bytes
from scalegpt.planner.time.links import Latency, Links
from scalegpt.planner.time.rates import Rates
from scalegpt.planner.time.step_time import (
    COMMUNICATION,
    HOST,
    LAUNCHES,
    STRAGGLERS,
    Sends,
    StepTime,
    StepWork,
    step_time,
)
from scalegpt.planner.time.work import count_work

NONE = Latency((0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
INSTANT = Rates(
    matmul=1e30, fill=0.0, attention=1e30, memory=1e30, loss=1e30, update=1e30, kernel=0.0, dispatch=4e-6,
    links=Links(gpus=10**6, nodes=1, inside=1e30, network=1e30, latency=NONE), overlap=0.0, interference=0.0,
    straggling=0.0, host_link=1e30, host_update=1e30, peak=1e30,
)  # fmt: skip
"""A card that needs no time for anything. Python still needs its own."""

L, H, T, V = 12, 512, 256, 1024


def made(**flags: Any) -> RunConfig:
    shape = {"n_layer": L, "n_embd": H, "n_head": 8, "block_size": T, "vocab_size": V, "micro_batch": 16}
    return resolve(flags={**shape, "precision": "fp32", "loss": "full", **flags})


def fsdp(stage: int = 2, **flags: Any) -> RunConfig:
    return made(backend="fsdp", zero_stage=stage, **flags)


def time(
    run: RunConfig, ranks: int = 1, grad_accum: int = 1, link: float = 1e30, message: float = 0.0, **rates: float
) -> StepTime:
    """The time at these rates; ``message`` are the seconds of each collective, however small."""
    if "memory" in rates:  # one memory holds everything
        rates = {"loss": rates["memory"], "update": rates["memory"], **rates}
    links = replace(INSTANT.links, inside=link, latency=NONE._replace(start=(message, message)))
    rates |= {"links": links}  # type: ignore[dict-item]
    return step_time(run, replace(INSTANT, **rates), ranks=ranks, grad_accum=grad_accum)


@cache
def random_steps(count: int = 48) -> list[tuple[StepWork, Rates]]:
    """Steps of the whole space, and the rates of the cards that they run on."""
    drawn = []
    for seed in range(4):
        draw = random.Random(seed)
        machine = draw_machine(draw, gpus=draw.choice([1, 2, 8]), nodes=draw.choice([1, 2]))
        run = draw_run(draw, precisions=("fp16", "fp32"))
        tokens = 12 * machine.ranks * run.model.block_size
        run = replace(run, train=run.train.changed(tokens_per_step=tokens))
        for each in draw.sample(space(run, machine), count // 4):
            counted = StepWork.of(
                each.run, ranks=each.batch.ranks, grad_accum=each.batch.grad_accum,
                kernel=each.estimator.kernel(each.run), compiled=each.estimator.compiles(each.run),
            )  # fmt: skip
            drawn.append((counted, each.estimator.rates(each.run)))
    return drawn


# --- the sum ---------------------------------------------------------------------------------------------------------


def test_parts_add_up_and_the_whole_is_the_same_without_them() -> None:
    for counted, rates in random_steps():
        given = counted.time(rates)
        assert min(given.parts.values()) > 0
        assert sum(given.parts.values()) == pytest.approx(given.seconds, rel=1e-12)
        assert counted.totals().seconds(rates) == pytest.approx(given.seconds, rel=1e-12)


def test_a_card_and_a_host_twice_as_fast_in_all_take_half_as_long() -> None:
    for counted, rates in random_steps():
        slow = rates.links
        start, inside, between = ((ring / 2, tree / 2) for ring, tree in slow.latency)
        links = replace(slow, inside=2 * slow.inside, network=2 * slow.network, latency=Latency(start, inside, between))
        twice = replace(
            rates, matmul=2 * rates.matmul, attention=2 * rates.attention, memory=2 * rates.memory, links=links,
            kernel=rates.kernel / 2, dispatch=rates.dispatch / 2, host_link=2 * rates.host_link,
            host_update=2 * rates.host_update, loss=2 * rates.loss, update=2 * rates.update,
        )  # fmt: skip
        assert counted.totals().seconds(twice) == pytest.approx(counted.time(rates).seconds / 2, rel=1e-12)


# --- one card --------------------------------------------------------------------------------------------------------


def test_matmuls_take_their_operations_over_the_rate() -> None:
    """Slow enough at matmuls alone, a step takes 6 operations for each weight that multiplies and each token."""
    operations = 6 * (12 * L * H**2 + V * H) * 16 * T
    assert time(made(), matmul=1e9).seconds == pytest.approx(operations / 1e9, rel=1e-6)
    assert time(made(), matmul=1e9, grad_accum=5).seconds == pytest.approx(5 * operations / 1e9, rel=1e-6)


def test_a_shallow_matmul_takes_longer_than_its_operations() -> None:
    """Each matmul takes as long as if it were ``fill`` deeper: 2·fill more operations for each number that it writes."""
    written = L * (16 * T * (3 * H + H + 4 * H + H) + 16 * T * (H + H + H + 4 * H) + 12 * H**2)
    written += 16 * T * (V + H) + V * H
    filled = [replace(INSTANT, matmul=1e9, fill=fill) for fill in (0.0, 100.0)]
    longer = time(made(), matmul=1e9, fill=100.0).seconds - time(made(), matmul=1e9).seconds
    assert longer == pytest.approx(2 * 100 * written / 1e9, rel=1e-6)
    math = [step_time(made(), rates, ranks=1, grad_accum=1, kernel="math").seconds for rates in filled]
    scores = L * (
        8 * T * T * 16 * 2 + 16 * T * H * 4
    )  # the scores and their gradient; output, and gradients of Q, K, V
    assert math[1] - math[0] == pytest.approx(2 * 100 * (written + scores) / 1e9, rel=1e-6)
    narrow, wide = (made(n_embd=width, n_head=4, vocab_size=64) for width in (256, 1024))
    shares = [time(run, matmul=1e9).seconds / time(run, matmul=1e9, fill=100.0).seconds for run in (narrow, wide)]
    assert shares[0] < shares[1] < 1


def test_attention_takes_its_operations_over_its_own_rate() -> None:
    operations = 7 * 16 * T * T * H * L  # 2 forward and 5 backward for each pair, of which half are masked
    assert time(made(), attention=1e8).seconds == pytest.approx(operations / 1e8, rel=1e-6)


def test_the_update_waits_for_memory() -> None:
    run = made()
    moved = sum(load.bytes for load in count_work(run, Mesh(), kernel="flash", compiled=True).update.values())
    step, update = time(run, memory=1e9), moved / 1e9
    assert step.parts["optimizer"] == pytest.approx(update)
    assert step.seconds > 2 * update


def test_each_micro_step_takes_as_long_and_the_update_comes_once() -> None:
    rates = Estimator(Machine.with_card(find_card("4090"))).rates(made(precision="bf16"))
    run = made(precision="bf16")
    times = [step_time(run, rates, ranks=1, grad_accum=count).seconds for count in (1, 2, 3, 10)]
    assert times[1] - times[0] == pytest.approx(times[2] - times[1])
    assert times[3] - times[2] == pytest.approx(7 * (times[2] - times[1]))
    assert 2 * times[0] > times[1]


def test_a_pass_is_never_shorter_than_python_needs() -> None:
    waiting = time(made())  # the card itself needs no time
    assert waiting.parts[LAUNCHES] == pytest.approx(waiting.seconds)
    eager = step_time(made(), INSTANT, ranks=1, grad_accum=1, compiled=False)
    assert eager.seconds > waiting.seconds  # a compiled block has fewer kernels
    busy = time(made(), matmul=1e9)
    assert busy.parts.get(LAUNCHES, 0.0) < 0.001 * busy.seconds


# --- several cards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_sending_costs_its_bytes_over_the_link_where_nothing_hides_it(stage: int) -> None:
    run = fsdp(stage)
    for grad_accum in (1, 4):
        alone = time(run, 8, grad_accum, matmul=1e9).seconds
        sending = time(run, 8, grad_accum, matmul=1e9, link=1e6).seconds - alone
        assert sending == pytest.approx(sent_bytes(run, ranks=8, grad_accum=grad_accum) / 1e6, rel=1e-6)


def one_message_of_each_pass(run: RunConfig, ranks: int, grad_accum: int) -> float:
    """Bytes of the messages that nothing can hide: one of each pass."""
    mesh = run.parallel.mesh(ranks)
    sends = Sends.of(collectives(run, mesh), grad_accum, mesh)
    return grad_accum * sum(each.bytes / each.messages for each in (*sends.forward[0], *sends.backward[0]))


def test_where_sending_is_short_all_of_it_hides_but_for_one_message_of_each_pass() -> None:
    run = fsdp(3)
    alone = time(run, 8, 2, matmul=1e9).seconds
    hidden = time(run, 8, 2, matmul=1e9, link=1e10, overlap=1.0).seconds
    assert hidden - alone == pytest.approx(one_message_of_each_pass(run, 8, 2) / 1e10, rel=1e-6)


def test_fewer_blocks_hide_less() -> None:
    """The same matmuls and weights in fewer blocks: what one message sends is more."""
    few, many = (fsdp(3, n_layer=layers, n_embd=width, vocab_size=64) for layers, width in ((3, 1024), (12, 512)))
    felt = [time(run, 8, matmul=1e9, link=1e10, overlap=1.0).parts[COMMUNICATION] for run in (few, many)]
    assert felt[0] > 2 * felt[1]


def test_what_hides_is_felt_by_its_interference() -> None:
    run = fsdp(3)
    sending = sent_bytes(run, ranks=8, grad_accum=2) / 1e10
    bare = one_message_of_each_pass(run, 8, 2) / 1e10
    felt = time(run, 8, 2, matmul=1e9, link=1e10, overlap=1.0, interference=0.25).parts[COMMUNICATION]
    assert felt == pytest.approx(bare + 0.25 * (sending - bare))


def test_a_step_is_no_shorter_than_its_sending_and_no_longer_than_all_one_after_another() -> None:
    run = fsdp(3)
    for link in (1e6, 1e8, 1e9, 1e10, 1e12):
        alone = time(run, 8, 2, matmul=1e11).seconds
        sending = sent_bytes(run, ranks=8, grad_accum=2) / link
        step = time(run, 8, 2, matmul=1e11, link=link, overlap=1.0).seconds
        assert max(alone, sending) <= step * (1 + 1e-9)
        assert step <= (alone + sending) * (1 + 1e-9)


def test_every_collective_costs_a_message() -> None:
    run = fsdp(2)  # the root and each block: gathered and reduced once a step
    assert time(run, 8, 3, message=1.0).parts[COMMUNICATION] == pytest.approx(2 * (L + 1), rel=1e-6)


def test_every_step_waits_for_the_slowest_of_several_machines() -> None:
    alone = time(fsdp(3), 16, 2, matmul=1e9, link=1e9)
    waits = time(fsdp(3), 16, 2, matmul=1e9, link=1e9, straggling=0.04)
    assert waits.seconds == pytest.approx(1.04 * alone.seconds)
    assert waits.parts[STRAGGLERS] == pytest.approx(0.04 * alone.seconds)
    assert STRAGGLERS not in alone.parts


def test_accumulating_spares_stage_2_the_sending_that_stage_3_repeats() -> None:
    steps = {
        stage: [time(fsdp(stage), 8, count, link=1e6).parts[COMMUNICATION] for count in (1, 8)] for stage in (2, 3)
    }
    assert steps[2][1] == pytest.approx(steps[2][0])
    assert steps[3][1] == pytest.approx(8 * steps[3][0])


# --- offload, and the least ------------------------------------------------------------------------------------------


def test_what_is_offloaded_travels_and_is_updated_in_host_memory() -> None:
    run = made(backend="deepspeed", zero_stage=2, offload="optimizer", precision="bf16")
    parameters = V * H + T * H + L * (12 * H**2 + 2 * H) + H
    travels = time(run, 4, host_link=1e6).parts[HOST]
    assert travels == pytest.approx(parameters / 4 * (4 + 2) / 1e6)  # an fp32 gradient, a bf16 weight
    assert time(run, 4, host_update=1e6).parts[HOST] == pytest.approx(parameters / 4 * 28 / 1e6)


def test_no_configuration_beats_the_least_that_its_sequences_take() -> None:
    """By which the search tells how many fewer cards could be faster at all."""
    for seed in range(4):
        draw = random.Random(seed)
        machine = draw_machine(draw, gpus=2, nodes=1)
        run = draw_run(draw, precisions=("fp16",))
        run = replace(run, train=run.train.changed(tokens_per_step=8 * run.model.block_size))
        for each in space(run, machine):
            least = each.estimator.least_seconds(each.run) * each.batch.sequences / each.batch.ranks
            assert least <= each.seconds
