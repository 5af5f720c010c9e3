"""Continuations drawn together: stop texts, their own ends, batches, and what the interface returns."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import scalegpt
from scalegpt.config.sampling import SamplingSettings
from scalegpt.data.tokenizers import make_tokenizer
from scalegpt.errors import InputError
from scalegpt.inference import continuations
from scalegpt.inference.continuations import Request, StopFilter, continue_prompts

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = st.text("ab", max_size=12)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine any draw is slow
@given(st.lists(TEXTS, max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_passes_up_to_the_first_stop_text_and_as_early_as_possible(pieces: list[str], stop: list[str]) -> None:
    passed, given_so_far, texts = "", "", StopFilter(stop)
    for piece in pieces:
        given_so_far += piece
        passed += texts.push(piece)
        places = [given_so_far.find(each) for each in stop if each in given_so_far]
        assert texts.is_stopped == bool(places)
        if places:
            assert passed == given_so_far[: min(places)]
            return
        kept = given_so_far.removeprefix(passed)
        assert passed + kept == given_so_far
        assert kept == "" or any(each.startswith(kept) for each in stop), (
            "only what may become a stop text is kept back"
        )
        assert not any(each.startswith(given_so_far[n:]) for n in range(len(passed)) for each in stop)
    assert passed + texts.finish() == given_so_far


def test_rows_of_a_batch_end_each_for_itself(tiny_run: Any) -> None:
    model = scalegpt.load(tiny_run(tokenizer=make_tokenizer("char", "\nab")), device="cpu")
    settings = SamplingSettings(max_new_tokens=15)
    ends = {}
    for part in model.stream(["a"], settings, num_samples=12, stop=["abba", "bbb"], micro_batch=12):
        assert part.index not in ends, "nothing comes after the last part"
        if part.whole is not None:
            ends[part.index] = part.whole
    assert {whole.finish_reason for whole in ends.values()} == {"stop", "length"}
    for number in range(12):
        text = model.generate("a", max_new_tokens=15, seed=settings.seed + number)
        places = [text.find(stop) for stop in ("abba", "bbb") if stop in text]
        assert ends[number].text == (text[: min(places)] if places else text)
        assert (ends[number].finish_reason == "stop") == bool(places)
        assert ends[number].seed == settings.seed + number


def test_prompts_of_equal_length_are_drawn_together_first_come_first_served(
    tiny_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scalegpt.load(tiny_run(), device="cpu")
    sizes: list[tuple[int, int]] = []
    real = continuations.draw_rows

    def recorded(forward: Any, config: Any, prompt: Any, *arguments: Any, **options: Any) -> Any:
        sizes.append(tuple(prompt.shape))
        return real(forward, config, prompt, *arguments, **options)

    monkeypatch.setattr(continuations, "draw_rows", recorded)
    lengths = [3, 5, 3, 3, 5, 40, 16, 3]
    requests = [Request([1] * length, 0) for length in lengths]
    parts = continue_prompts(model.model, model.tokenizer, requests, SamplingSettings(max_new_tokens=1), micro_batch=3)
    assert [part.index for part in parts] == [0, 2, 3, 1, 4, 5, 6, 7]
    assert sizes == [(3, 3), (2, 5), (2, 16), (1, 3)]


def test_a_stop_text_of_the_interface(tiny_run: Any) -> None:
    model = scalegpt.load(tiny_run(tokenizer=make_tokenizer("char", "\nab")), device="cpu")
    text = model.generate("a", max_new_tokens=30)
    assert "b" in text
    assert model.generate("a", max_new_tokens=30, stop="b") == text[: text.index("b")]
    assert model.generate("a", max_new_tokens=30, stop=["b", "a"]) == ""
    for stop in ("", ["a", ""]):
        with pytest.raises(InputError, match="stop must not be empty"):
            model.generate("a", stop=stop)


def test_the_probability_of_a_continuation_is_what_the_evaluation_finds(tiny_run: Any, tmp_path: Any) -> None:
    model = scalegpt.load(tiny_run(tokenizer=make_tokenizer("char", "abcdef"), block_size=64), device="cpu")
    settings = SamplingSettings(max_new_tokens=20, top_k=3, temperature=0.7)
    (whole,) = [part.whole for part in model.stream(["a"], settings) if part.whole is not None]
    (tmp_path / "text.txt").write_text("a" + whole.text, encoding="utf-8")
    assert model.evaluate(tmp_path / "text.txt").nats == pytest.approx(-whole.logprob, rel=1e-5)
