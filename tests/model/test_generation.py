"""Drawing tokens: the semantics of each setting, the cache and its restart, stopping, determinism."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from scalegpt.config import ModelConfig
from scalegpt.errors import InputError, RunError
from scalegpt.model.generation import SamplingSettings, draw, draw_rows, generate

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = SamplingSettings(temperature=0)
CONFIG = ModelConfig(n_layer=1, n_embd=4, n_head=1, block_size=8, vocab_size=61)


def run(model: Any, prompt: Tensor, count: int, settings: SamplingSettings, **options: Any) -> Tensor:
    """All drawn tokens, [B, count]."""
    drawn = list(generate(model, model.config, prompt, replace(settings, max_new_tokens=count), **options))
    return torch.stack(drawn, dim=1)


def without_cache(model: Any, prompt: Tensor, count: int, settings: SamplingSettings) -> Tensor:
    """What generation should give, from whole forward passes over the window as it is documented."""
    generators = [torch.Generator().manual_seed(settings.seed + row) for row in range(len(prompt))]
    window = model.config.block_size
    context, drawn = prompt[:, -window:], []
    with torch.no_grad():
        for _ in range(count):
            if context.shape[1] > window:
                context = context[:, -(window // 2) :]
            rows = zip(model(context).split(1), generators, strict=True)
            drawn.append(torch.cat([draw(row, settings, generator) for row, generator in rows]))
            context = torch.cat((context, drawn[-1].unsqueeze(1)), dim=1)
    return torch.stack(drawn, dim=1)


def frequencies(logits: list[float], count: int = 4000, **settings: Any) -> dict[int, float]:
    """The share of each token among many draws from one row of logits."""
    rows = torch.tensor([logits]).expand(count, -1)
    drawn = draw(rows, SamplingSettings(**settings), torch.Generator().manual_seed(0))
    return {token: n / count for token, n in Counter(drawn.tolist()).items()}


@pytest.mark.parametrize("length", [1, 5, 16, 40])
@pytest.mark.parametrize("settings", [GREEDY, SamplingSettings(top_k=20, top_p=0.9, temperature=1.5)])
@pytest.mark.parametrize("shape", [{}, {"position": "rope", "n_kv_head": 1}, {"position": "none", "head_size": 8}])
def test_cached_generation_equals_whole_passes(
    tiny_model: Any, shape: dict[str, Any], length: int, settings: SamplingSettings
) -> None:
    model = tiny_model(seed=1, **shape).eval()
    prompt = torch.randint(61, (3, length), generator=torch.Generator().manual_seed(2))
    assert torch.equal(run(model, prompt, 45, settings), without_cache(model, prompt, 45, settings))


def test_passes_are_short_and_the_window_restarts_from_its_half(tiny_model: Any) -> None:
    model = tiny_model().eval()
    lengths: list[tuple[int, int]] = []

    def forward(tokens: Tensor, targets: None, cache: Any) -> Tensor:
        lengths.append((tokens.shape[1], cache.length))
        result: Tensor = model(tokens, targets, cache)
        return result

    list(generate(forward, model.config, torch.zeros(1, 10, dtype=torch.long), replace(GREEDY, max_new_tokens=20)))
    expected = [(10, 0)] + [(1, past) for past in range(10, 16)] + [(8, 0)] + [(1, past) for past in range(8, 16)]
    assert lengths[: len(expected)] == expected
    assert lengths[len(expected)] == (8, 0)


def test_a_block_of_one_token_still_generates(tiny_model: Any) -> None:
    model = tiny_model(block_size=1).eval()
    assert run(model, torch.zeros(2, 3, dtype=torch.long), 4, GREEDY).shape == (2, 4)


def test_the_seed_decides_and_the_global_random_state_does_not(tiny_model: Any) -> None:
    model = tiny_model().eval()
    prompt = torch.zeros(2, 3, dtype=torch.long)
    first = run(model, prompt, 20, SamplingSettings(seed=7))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert torch.equal(run(model, prompt, 20, SamplingSettings(seed=7)), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(run(model, prompt, 20, SamplingSettings(seed=8)), first)


def test_tokens_come_one_by_one_and_gradients_stay_on_for_the_caller(tiny_model: Any) -> None:
    model = tiny_model().eval()
    calls = 0

    def forward(tokens: Tensor, targets: None, cache: Any) -> Tensor:
        nonlocal calls
        calls += 1
        assert not torch.is_grad_enabled()
        result: Tensor = model(tokens, targets, cache)
        return result

    stream = generate(forward, model.config, torch.zeros(2, 3, dtype=torch.long), replace(GREEDY, max_new_tokens=5))
    for i in range(5):
        token = next(stream)
        assert calls == i + 1
        assert torch.is_grad_enabled()
        assert (token.shape, token.dtype, token.device.type) == ((2,), torch.int64, "cpu")
    assert next(stream, None) is None


def test_top_k_of_one_is_greedy(tiny_model: Any) -> None:
    model = tiny_model().eval()
    prompt = torch.arange(6).view(2, 3)
    assert torch.equal(run(model, prompt, 30, SamplingSettings(top_k=1, seed=3)), run(model, prompt, 30, GREEDY))


def test_probabilities_follow_the_softmax_of_the_temperature() -> None:
    logits = [2.0, 1.0, 0.0, -1.0]
    for temperature in (0.5, 1.0, 2.0):
        expected = (torch.tensor(logits) / temperature).softmax(0)
        found = frequencies(logits, temperature=temperature)
        for token, share in enumerate(expected.tolist()):
            assert found.get(token, 0.0) == pytest.approx(share, abs=0.03)


def test_top_k_keeps_k_and_their_proportions() -> None:
    found = frequencies([1.0, 3.0, 2.0, 0.0], top_k=2)
    assert found.keys() == {1, 2}
    assert found[1] == pytest.approx(torch.tensor([3.0, 2.0]).softmax(0)[0].item(), abs=0.03)
    assert len(frequencies([1.0, 1.0, 1.0, 1.0], top_k=3)) == 3  # ties make no extra candidates
    assert frequencies([1.0, 3.0], top_k=50).keys() == {0, 1}


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.01, {1}),
        (0.5, {1}),
        (0.51, {1, 3}),
        (0.8, {1, 3}),
        (0.81, {1, 3, 0}),
        (0.96, {0, 1, 2, 3}),
        (1.0, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float, kept: set[int]) -> None:
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3], dtype=torch.float64).log()
    # A hair more on the first, so that 0.5 and 0.8 are reached in spite of rounding.
    logits[1] += 1e-9
    logits[3] += 1e-9
    found = frequencies(logits.tolist(), top_p=top_p - 1e-7 if top_p < 1 else top_p)
    assert found.keys() == kept


def test_top_p_applies_to_what_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
    assert frequencies(logits, top_p=0.65).keys() == {0, 1}
    assert frequencies(logits, top_k=2, top_p=0.55).keys() == {0}, "0.4 of 0.7 is more than 0.55"


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-9])
def test_the_tiniest_temperature_is_greedy(temperature: float) -> None:
    assert frequencies([1.0, 3.0, 2.999], count=200, temperature=temperature).keys() == {1}


def test_ids_beyond_the_limit_are_never_drawn(tiny_model: Any) -> None:
    model = tiny_model().eval()
    with torch.no_grad():
        model.wte.weight[50:] *= 100  # the padding would win
        model.wpe.weight *= 100
    prompt = torch.zeros(4, 2, dtype=torch.long)
    assert run(model, prompt, 30, GREEDY).max() >= 50
    for settings in (GREEDY, SamplingSettings(), SamplingSettings(top_k=60, temperature=5.0)):
        assert run(model, prompt, 30, settings, limit_vocab=50).max() < 50


def scripted(rows: list[list[int]]) -> Any:
    """A forward whose likeliest tokens are given, step by step."""
    steps = iter(zip(*rows, strict=True))

    def forward(tokens: Tensor, targets: None, cache: Any) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(next(steps)), 61).float()

    return forward


def test_a_row_is_drawn_as_alone_with_its_seed(tiny_model: Any) -> None:
    model = tiny_model().eval()
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 2, 3]])
    settings = SamplingSettings(max_new_tokens=25, top_p=0.9)
    together = list(draw_rows(model, model.config, prompt, settings, seeds=[7, 8, 7]))
    tokens = torch.stack([drawn.tokens for drawn in together], dim=1)
    for row, seed in enumerate((7, 8, 7)):
        assert torch.equal(tokens[row : row + 1], run(model, prompt[row : row + 1], 25, replace(settings, seed=seed)))
    assert torch.equal(tokens[0], tokens[2])
    assert not torch.equal(tokens[0], tokens[1])


def test_logprobs_are_those_of_the_whole_vocabulary_at_temperature_1(tiny_model: Any) -> None:
    model = tiny_model().eval()
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    settings = SamplingSettings(max_new_tokens=9, temperature=0.3, top_k=4)
    context = prompt
    for drawn in draw_rows(model, model.config, prompt, settings, limit_vocab=50):
        with torch.no_grad():
            expected = model(context).double().log_softmax(-1).gather(1, drawn.tokens.unsqueeze(1)).squeeze(1)
        assert drawn.logprobs.dtype == torch.float64
        assert torch.allclose(drawn.logprobs, expected, atol=1e-5)
        context = torch.cat((context, drawn.tokens.unsqueeze(1)), dim=1)


def test_rows_end_at_the_stop_token_and_wait_for_each_other() -> None:
    forward = scripted([[5, 9, 7, 7, 7], [4, 4, 4, 9, 3]])
    drawn = list(
        generate(forward, CONFIG, torch.zeros(2, 1, dtype=torch.long), replace(GREEDY, max_new_tokens=5), stop_token=9)
    )
    assert torch.stack(drawn, dim=1).tolist() == [[5, 9, 9, 9], [4, 4, 4, 9]]
    forward = scripted([[5, 9, 7, 7, 7], [4, 4, 4, 9, 3]])
    rows = draw_rows(
        forward, CONFIG, torch.zeros(2, 1, dtype=torch.long), replace(GREEDY, max_new_tokens=5), stop_token=9
    )
    logprobs = torch.stack([each.logprobs for each in rows], dim=1)
    assert (logprobs[0, :2] < 0).all(), "the stop token counts"
    assert (logprobs[0, 2:] == 0).all(), "what is drawn after it does not"
    assert (logprobs[1] < 0).all()


def test_bad_prompts_are_refused(tiny_model: Any) -> None:
    model = tiny_model()
    with pytest.raises(InputError, match="empty"):
        run(model, torch.zeros(1, 0, dtype=torch.long), 1, GREEDY)
    for token in (61, -1):
        with pytest.raises(InputError, match=f"token {token}, but the model's tokens are 0 to 60"):
            run(model, torch.tensor([[3, token]]), 1, GREEDY)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [GREEDY, SamplingSettings()])
def test_a_diverged_model_is_an_error_and_no_text(value: float, settings: SamplingSettings) -> None:
    def forward(tokens: Tensor, targets: None, cache: Any) -> Tensor:
        return torch.tensor([[0.0, value, 1.0]])

    with pytest.raises(RunError, match="not finite"):
        next(generate(forward, CONFIG, torch.zeros(1, 1, dtype=torch.long), settings))


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}, {"seed": -1}, {"max_new_tokens": 0}]
)
def test_settings_outside_their_bounds_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        SamplingSettings(**bad)
