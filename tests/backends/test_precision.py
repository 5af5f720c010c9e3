"""Which precision ``auto`` takes."""

from types import SimpleNamespace

import pytest
import torch

from scalegpt.backends import precision
from scalegpt.backends.precision import bf16_pays_on_cpu, resolve_precision
from scalegpt.config import ModelConfig
from scalegpt.errors import InputError

MODEL = ModelConfig(n_layer=4, n_embd=16, n_head=2, block_size=8, vocab_size=400)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("wanted", ["fp32", "bf16", "fp16"])
def test_a_cpu_takes_every_precision(wanted: str) -> None:
    assert resolve_precision(wanted, CPU, MODEL, 64) == wanted


@pytest.mark.parametrize(("pays", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_a_cpu_follows_the_measurement(monkeypatch: pytest.MonkeyPatch, pays: bool, expected: str) -> None:
    monkeypatch.setattr(precision, "bf16_pays_on_cpu", lambda model, rows: pays)
    assert resolve_precision("auto", CPU, MODEL, 64) == expected


def test_the_measurement_takes_a_clear_gain_and_touches_no_random_numbers() -> None:
    before = torch.get_rng_state()
    assert isinstance(bf16_pays_on_cpu(MODEL, 64, times=1), bool)
    assert not bf16_pays_on_cpu(MODEL, 64, times=1, gain=1e9)
    assert bf16_pays_on_cpu(MODEL, 64, times=1, gain=0.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("slowdown", "runs"), [(2.0, 6), (50.0, 2)])
def test_a_hopeless_precision_is_timed_twice(monkeypatch: pytest.MonkeyPatch, slowdown: float, runs: int) -> None:
    """By a clock that only the slices move on: a second for fp32, ``slowdown`` seconds for bf16."""
    trained, now = [], 0.0

    def train(self: precision._Slice) -> None:
        nonlocal now
        in_bf16 = self.model.compute_dtype == torch.bfloat16
        now += slowdown if in_bf16 else 1.0
        trained.append(in_bf16)

    monkeypatch.setattr(precision._Slice, "train", train)
    monkeypatch.setattr(precision, "time", SimpleNamespace(perf_counter=lambda: now))
    assert not bf16_pays_on_cpu(MODEL, 64, times=5)
    assert trained == [False, True] * runs


WIDE = MODEL.changed(n_embd=256)  # 790,000 parameters a block
NARROW = MODEL.changed(n_layer=400)  # 3,104 a block


@pytest.mark.parametrize(
    ("model", "rows", "layers", "vocab", "size"),
    [
        (MODEL, 64, 4, 400, (8, 8)),  # the whole of a small one
        (WIDE, 64, 1, 100, (8, 8)),
        (WIDE.changed(vocab_size=0), 64, 1, 64, (8, 8)),
        (WIDE.changed(vocab_size=4000), 3, 1, 1000, (1, 3)),
        (WIDE, 10**6, 1, 100, (128, 8)),
        (NARROW.changed(vocab_size=40_000), 64, 212, 21_200, (8, 8)),
    ],
)
def test_the_slice_is_some_blocks_with_their_share_of_the_vocabulary(
    model: ModelConfig, rows: int, layers: int, vocab: int, size: tuple[int, int]
) -> None:
    some = precision._Slice(model, rows, "bf16")
    assert (len(some.model.blocks), some.model.wte.weight.shape) == (layers, (vocab, model.n_embd))
    assert some.tokens.shape == size
    some.train()
    assert all(parameter.grad is not None for parameter in some.model.parameters())


def test_auto_on_a_card_is_bf16_where_there_is_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test 100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert resolve_precision("auto", CUDA, MODEL, 64) == "bf16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert resolve_precision("auto", CUDA, MODEL, 64) == "fp16"
    assert resolve_precision("fp32", CUDA, MODEL, 64) == "fp32"
    with pytest.raises(InputError, match="NVIDIA Test 100 has no bf16; use --precision fp16"):
        resolve_precision("bf16", CUDA, MODEL, 64)
