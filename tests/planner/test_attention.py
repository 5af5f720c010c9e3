"""Which attention kernel a card takes, and what each of them keeps."""

from typing import Any

import pytest

from scalegpt.architecture.kernels import Heads, attention_backward, embedding_backward
from scalegpt.architecture.layers import Numerics
from scalegpt.architecture.operations import Recorder, Size, Value
from scalegpt.architecture.parts import Attention
from scalegpt.config import RunConfig
from scalegpt.config.presets import resolve
from scalegpt.errors import InputError
from scalegpt.hardware.gpus import Card, find_card
from scalegpt.planner.attention import attention_kernel, unfit
from scalegpt.planner.checks import check_attention
from scalegpt.planner.memory.predict import predict
from scalegpt.planner.memory.tape import Compiler
from scalegpt.planner.memory.timeline import ACTIVATIONS, TEMPORARIES, Timeline


def configure(head: int, heads: int = 4, **flags: Any) -> RunConfig:
    return resolve(flags={"precision": "bf16", "n_embd": heads * head, "n_head": heads, **flags})


def card(name: str | None) -> Card | None:
    return None if name is None else find_card(name)


TAKEN = [
    (None, 64, {}, "flash"),
    (None, 60, {}, "flash"),
    (None, 256, {}, "flash"),
    (None, 264, {}, "mem_efficient"),
    (None, 260, {}, "math"),
    (None, 64, {"precision": "fp32"}, "mem_efficient"),
    (None, 60, {"precision": "fp32"}, "mem_efficient"),
    (None, 30, {"precision": "fp32"}, "math"),
    ("a100-40gb", 64, {}, "flash"),
    ("h100", 64, {}, "cudnn"),
    ("h100", 64, {"dropout": 0.1}, "flash"),
    ("h100", 64, {"dropout": 0.125}, "cudnn"),
    ("h100", 60, {}, "flash"),
    ("4090", 208, {}, "mem_efficient"),
    ("4090", 240, {}, "flash"),
    ("4090", 240, {"dropout": 0.1}, "mem_efficient"),
    ("t4", 64, {"precision": "fp16"}, "mem_efficient"),
    ("t4", 60, {"precision": "fp16"}, "math"),
    ("t4", 30, {"precision": "fp32"}, "mem_efficient"),
    ("v100-16gb", 64, {"precision": "fp16"}, "mem_efficient"),
    ("t4", 64, {"precision": "fp16", "attention": "math"}, "math"),
]


@pytest.mark.parametrize(("name", "head", "flags", "kernel"), TAKEN)
def test_what_a_card_takes(name: str | None, head: int, flags: dict[str, Any], kernel: str) -> None:
    run = configure(head, **flags)
    assert attention_kernel(run, card(name)) == kernel
    assert unfit(kernel, run, card(name)) is None
    check_attention(run, run.train.precision, card(name))


REFUSED = [
    ("flash", None, 64, {"precision": "fp32"}, "not fp32"),
    ("flash", "t4", 64, {"precision": "fp16"}, "does not run on T4"),
    ("flash", None, 257, {}, "at most 256, not 257"),
    ("cudnn", None, 60, {}, "multiple of 8, not 60"),
    ("cudnn", "a100-40gb", 136, {}, "at most 128, not 136"),
    ("cudnn", None, 64, {"dropout": 0.1}, "sixteenths"),
    ("cudnn", "mi300x", 64, {}, "not Nvidia's"),
    ("mem_efficient", None, 60, {}, "multiple of 8 in bf16, not 60"),
    ("mem_efficient", None, 30, {"precision": "fp32"}, "multiple of 4 in fp32, not 30"),
]


@pytest.mark.parametrize(("kernel", "name", "head", "flags", "words"), REFUSED)
def test_what_is_refused(kernel: str, name: str | None, head: int, flags: dict[str, Any], words: str) -> None:
    run = configure(head, attention=kernel, **flags)
    with pytest.raises(InputError, match=f"attention {kernel} .*{words}.*; use --attention auto"):
        check_attention(run, run.train.precision, card(name))


B, A, T, D = 2, 4, 96, 40
U, SCORES = 2 * B * T * A * D, 4 * B * A * T * T


def kept(kernel: str, head: int = D, **flags: Any) -> int:
    """Bytes that live between attention's forward and backward, besides its input and its result."""
    run = configure(head, A, micro_batch=B, block_size=T, **flags)
    result = Size(2 * T * A * head)
    r, x = Recorder(), Value(result)
    y = Attention(run.model).record(r, x, T, Numerics(compute=2, residual=2, weights=2, kernel=kernel))
    program = Compiler(r, x, y, 2).compile().at(B)
    timeline = Timeline()
    program.forward(timeline)
    left = timeline.total - result.at(B)
    timeline.take(ACTIVATIONS, result.at(B))  # the input
    timeline.take(TEMPORARIES, result.at(B))  # the result's gradient
    program.leave(timeline)
    program.backward(timeline, lambda _name, elements: timeline.give(TEMPORARIES, 2 * elements))
    assert timeline.total == 2 * result.at(B)  # the result itself, and the input's gradient
    return left


def test_what_each_kernel_keeps() -> None:
    rows, states = 4 * B * A * T, 1024
    assert kept("flash") == 4 * U + rows + states
    assert kept("mem_efficient") == 4 * U + rows + states
    assert kept("cudnn") == 4 * U + rows + states
    assert kept("math") == 3 * 2 * U + SCORES + U  # fp32 copies of Q, K and V, the softmax, the projection's input
    assert kept("math", dropout=0.1) == 3 * 2 * U + SCORES + SCORES + SCORES // 4 + U


def test_a_head_that_is_no_multiple_of_eight_is_padded() -> None:
    """Four padded tensors are kept, and the projection's input cut out of the last."""
    narrow = 36
    own, padded = U * narrow // D, U  # 36 becomes 40
    assert own % 512 == padded % 512 == 0
    assert kept("flash", narrow) == 4 * padded + own + 4 * B * A * T + 1024


def test_only_math_grows_with_the_square_of_the_block() -> None:
    def peak(block: int, attention: str) -> int:
        run = configure(64, micro_batch=1, n_layer=8, vocab_size=100, attention=attention, block_size=block)
        return predict(run).peak_bytes

    assert peak(8192, "flash") / peak(4096, "flash") < 2.1
    assert peak(8192, "math") / peak(4096, "math") > 3.5


def test_a_card_without_flash_is_planned_with_what_it_has() -> None:
    run = configure(60, precision="fp16", n_layer=8, block_size=1024)
    old = predict(run, card=find_card("t4"))
    assert old == predict(configure(60, precision="fp16", n_layer=8, block_size=1024, attention="math"))
    assert old.peak_bytes > predict(run).peak_bytes


def test_sums_in_the_backward_pass() -> None:
    """By hand, from the kernels' sources: B·a = 2·3 matrices of T = 130 rows."""
    flash = dict(attention_backward("flash", Heads(2, 3, 130, 40, 2, 3)))
    assert flash == {"flash backward: softmax_d": 4 * 6 * 256, "flash backward: dq_accum": 4 * 6 * 256 * 64}
    grouped = dict(attention_backward("flash", Heads(2, 3, 130, 40, 2, 1)))
    each = 2 * 2 * 3 * 130 * 40
    assert grouped == flash | {f"flash backward: {name} of each query": each for name in ("dk", "dv")}
    efficient = dict(attention_backward("mem_efficient", Heads(2, 3, 130, 40, 2, 3)))
    assert efficient["mem_efficient backward: fp32 sums"] == 4 * 6 * 3 * (
        64 * 64 + 4
    )  # three tiles of 64 × 64, each a lock
    wide = dict(attention_backward("mem_efficient", Heads(2, 3, 130, 264, 2, 3)))
    tiles = 2 * 5 * (128 * 64 + 4)
    assert wide["mem_efficient backward: fp32 sums"] == 4 * 6 * (tiles + 2 * 3 * 64 * 384)
    assert attention_backward("math", Heads(2, 3, 130, 40, 2, 3)) == ()


def test_few_tokens_are_added_up_without_space() -> None:
    assert embedding_backward(3072, 50_304, 768) == ()
    extras = dict(embedding_backward(8192, 50_304, 768))
    assert extras["embedding backward: partial sums"] == 4 * (819 + 8192) * 768
