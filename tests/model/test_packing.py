"""Packed documents: each document of a sequence is computed as if it were alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from scalegpt.config import ModelConfig
from scalegpt.model.chunk import IGNORED
from scalegpt.model.gpt import GPT
from scalegpt.model.packing import pack
from scalegpt.model.recompute import apply_recompute

END = 0
SHAPE = {"n_layer": 2, "n_embd": 32, "n_head": 4, "block_size": 24, "vocab_size": 50}

SHAPES: dict[str, dict[str, Any]] = {
    "learned positions": {},
    "rotary positions": {"position": "rope", "rotary_share": 0.5},
    "no positions": {"position": "none"},
    "grouped queries": {"position": "rope", "n_kv_head": 2, "norm": "rmsnorm", "activation": "swiglu"},
    "an untied head and a parallel block": {"tie_head": False, "parallel_block": True, "bias": True},
}


def model_of(**settings: Any) -> GPT:
    model = GPT(ModelConfig(**{**SHAPE, **settings}))
    with torch.no_grad():
        for name, value in model.initial_weights(3):
            model.get_parameter(name).copy_(value * 10 if value.dim() > 1 else value)
    return model


def documents() -> list[Tensor]:
    """Three documents, each with its end, of together 24 tokens."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.cat([torch.randint(1, 50, (length - 1,), generator=generator), torch.tensor([END])])
        for length in (9, 1, 14)
    ]


def targets_of(tokens: Tensor) -> Tensor:
    following = torch.cat([tokens[1:], torch.tensor([IGNORED])])
    return following.masked_fill(tokens == END, IGNORED)


def gradients(model: GPT, batches: list[tuple[Tensor, Tensor]], total: int) -> dict[str, Tensor]:
    """The gradients of the sum of the losses of all counted targets, divided by ``total``."""
    model.zero_grad()
    for tokens, targets in batches:
        counted = int((targets != IGNORED).sum())
        if counted:
            (model(tokens[None], targets[None]) * counted / total).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_documents_of_a_sequence_are_trained_as_if_each_were_alone(settings: dict[str, Any], recompute: str) -> None:
    model = model_of(**settings)
    alone = gradients(model, [(each, targets_of(each)) for each in documents()], total=24)
    apply_recompute(model, recompute)
    model.set_packing(END)
    tokens = torch.cat(documents())
    model.zero_grad()
    loss = model(tokens[None], targets_of(tokens)[None])
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected = alone.get(name, torch.zeros_like(parameter))
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_an_evaluation_returns_the_mean_over_the_counted_targets() -> None:
    model = model_of()
    model.set_packing(END)
    tokens = torch.cat(documents())
    targets = targets_of(tokens)
    share = float((targets != IGNORED).float().mean())
    assert share < 0.9
    trained = float(model(tokens[None], targets[None]))
    model.eval()
    assert float(model(tokens[None], targets[None])) == pytest.approx(trained / share, rel=1e-6)


def test_generation_reads_the_whole_context() -> None:
    model = model_of()
    tokens = torch.cat(documents())[None]
    plain = model(tokens)
    model.set_packing(END)
    assert torch.equal(model(tokens), plain)


@pytest.mark.parametrize("length", [16, 13])
def test_the_mask_is_aligned_and_lets_each_token_see_its_document(length: int) -> None:
    tokens = torch.randint(0, 3, (3, length), generator=torch.Generator().manual_seed(2))
    positions, mask = pack(tokens, END, torch.bfloat16)
    assert all(stride % 8 == 0 for stride in mask.stride()[:-1])
    for row in range(3):
        start = 0
        for place in range(length):
            if place and tokens[row, place - 1] == END:
                start = place
            assert int(positions[row, place]) == place - start
            seen = [other for other in range(length) if mask[row, 0, place, other] == 0]
            assert seen == list(range(start, place + 1))
