"""``scalegpt sample``: the text and how it arrives, determinism, and the error lines."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from replaced import replaced_at
from scalegpt.cli.main import main
from scalegpt.data.tokenizers import REPLACEMENT, make_tokenizer
from scalegpt.model.generation import Drawn

Sample = Any


def lines_of(text: str) -> list[dict[str, Any]]:
    """The objects of JSON Lines."""
    return [json.loads(line) for line in text.splitlines()]


def drawn(token: int) -> Drawn:
    """What the model draws for one row: the token, with half a nat."""
    return Drawn(torch.tensor([token]), torch.tensor([-0.5]))


@pytest.fixture
def sample(capsys: pytest.CaptureFixture[str]) -> Sample:
    """Run the command; its standard output."""

    def run(folder: Path, *words: str) -> str:
        capsys.readouterr()
        status = main(["sample", str(folder), "--device", "cpu", *words])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return captured.out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Sample:
    """Run the command in vain; its one line of complaint."""

    def run(*words: str, status: int = 2) -> str:
        assert main(["sample", *map(str, words)]) == status
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert "Traceback" not in captured.err
        return captured.err

    return run


@pytest.fixture
def letters(tiny_run: Any) -> Path:
    """A run with a character-level tokenizer."""
    return tiny_run(tokenizer=make_tokenizer("char", "\n abcdefghijklmnopqrstuvwxyzè"))


def test_the_seed_decides_the_text(letters: Path, sample: Sample) -> None:
    first = sample(letters, "--prompt", "abc", "--max_new_tokens", "60", "--seed", "3")
    assert first.startswith("abc")
    assert len(first) == len("abc") + 60 + 1
    assert sample(letters, "--prompt", "abc", "--max_new_tokens", "60", "--seed", "3") == first
    assert sample(letters, "--prompt", "abc", "--max_new_tokens", "60", "--seed", "4") != first


def test_greedy_takes_the_likeliest_and_top_k_of_one_is_greedy(letters: Path, sample: Sample) -> None:
    words = ("--prompt", "abc", "--max_new_tokens", "40")
    greedy = sample(letters, *words, "--temperature", "0")
    assert sample(letters, *words, "--temperature", "0", "--seed", "9") == greedy
    assert sample(letters, *words, "--top_k", "1", "--seed", "9") == greedy
    assert sample(letters, *words, "--top-p", "1e-9") == greedy
    assert sample(letters, *words) != greedy


@pytest.mark.parametrize("kind", ["byte", "gpt2"])
def test_streamed_text_is_the_json_text(tiny_run: Any, sample: Sample, kind: str) -> None:
    run = tiny_run(tokenizer=make_tokenizer(kind), n_embd=8)
    words = ("--prompt", "Città 🎉", "--max_new_tokens", "40", "--num_samples", "3", "--temperature", "2")
    streamed = sample(run, *words)
    documents = lines_of(sample(run, *words, "--json"))
    separator = "\n" + "-" * 40 + "\n"
    assert streamed == separator.join("Città 🎉" + document["continuation"] for document in documents) + "\n"
    for number, document in enumerate(documents):
        assert (document["run"], document["step"], document["prompt"]) == (str(run), 10, "Città 🎉")
        assert document["seed"] == 1337 + number
        assert 1 <= document["tokens"] <= 40
        assert document["finish_reason"] == ("length" if document["tokens"] == 40 else "end_of_text")
        assert document["logprob"] < 0
    assert len({document["continuation"] for document in documents}) == 3


def test_each_sample_uses_the_next_seed(letters: Path, sample: Sample) -> None:
    words = ("--prompt", "a", "--max_new_tokens", "20", "--json")
    both = lines_of(sample(letters, *words, "--seed", "5", "--num_samples", "2"))
    (second,) = lines_of(sample(letters, *words, "--seed", "6"))
    assert second.pop("logprob") == pytest.approx(both[1].pop("logprob"), rel=1e-6)
    assert second == both[1]


def test_a_batch_of_prompts_gives_what_each_gives_alone(letters: Path, sample: Sample, tmp_path: Path) -> None:
    prompts = ["abc", "hello world, no", "abc", "x", "xyz", "a much longer text than the block of the model"]
    prompts = [prompt.replace(",", "") for prompt in prompts]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    words = ("--temperature", "0", "--max_new_tokens", "30", "--json", "--num_samples", "2")
    batched = lines_of(sample(letters, "--prompts_file", str(tmp_path / "prompts.txt"), *words))
    alone = [line for prompt in prompts for line in lines_of(sample(letters, "--prompt", prompt, *words))]
    assert [line["prompt"] for line in batched] == [prompt for prompt in prompts for _ in range(2)]
    for one, other in zip(batched, alone, strict=True):
        assert one.pop("logprob") == pytest.approx(other.pop("logprob"), rel=1e-6)
        assert one == other
    one_by_one = lines_of(
        sample(letters, "--prompts_file", str(tmp_path / "prompts.txt"), *words, "--micro_batch", "1")
    )
    assert [line["continuation"] for line in one_by_one] == [line["continuation"] for line in batched]


def test_prompts_may_be_json_lines(letters: Path, sample: Sample, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": prompt, "id": 3}) for prompt in ("a\nb", "", "è")]
    words = ("--max_new_tokens", "2", "--json")
    for name in ("prompts.jsonl", "prompts.txt"):
        (tmp_path / name).write_text("\n".join(lines))
        found = lines_of(sample(letters, "--prompts_file", str(tmp_path / name), *words))
        assert [line["prompt"] for line in found] == ["a\nb", "", "è"]


def test_prompts_may_come_from_standard_input(
    letters: Path, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(monkeypatch, b"one\r\n\n two\n", tmp_path)
    found = lines_of(sample(letters, "--prompts_file", "-", "--max_new_tokens", "2", "--json"))
    assert [line["prompt"] for line in found] == ["one", " two"]


def test_prompts_that_cannot_be_read_are_refused(letters: Path, refused: Sample, tmp_path: Path) -> None:
    for name, text, words in (
        ("a.txt", "\n \n", "holds no prompt"),
        ("b.jsonl", '{"prompt": "a"}\n\n{"promt": "b"}', "b.jsonl, line 3 is not a JSON object like"),
        ("c.jsonl", '{"prompt": 3}', "line 1 is not a JSON object"),
        ("d.jsonl", '{"prompt": "a"', "line 1 is not a JSON object"),
        ("e.txt", '{"prompt": "a"}\nb', "line 2 is not a JSON object"),
        ("f.txt", "a\nb!", "prompt 2: character '!'"),
    ):
        (tmp_path / name).write_text(text)
        assert words in refused(letters, "--prompts_file", tmp_path / name, "--device", "cpu")


def test_a_stop_text_ends_a_continuation_and_is_not_shown(letters: Path, sample: Sample) -> None:
    words = ("--prompt", "abc", "--max_new_tokens", "60", "--seed", "3")
    (whole,) = lines_of(sample(letters, *words, "--json"))
    text = whole["continuation"]
    stop = text[20:23]
    (cut,) = lines_of(sample(letters, *words, "--json", "--stop", stop))
    assert cut["continuation"] == text[: text.index(stop)]
    assert (cut["finish_reason"], cut["tokens"]) == ("stop", text.index(stop) + 3)
    assert whole["logprob"] < cut["logprob"] < 0
    assert sample(letters, *words, "--stop", "never", "--stop", stop) == f"abc{cut['continuation']}\n"
    assert lines_of(sample(letters, *words, "--json", "--stop", text + "a")) == [whole]


class Recorder(io.TextIOBase):
    """A standard output that remembers each write, and what was flushed when a token was drawn."""

    def __init__(self) -> None:
        self.text = self.flushed = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        self.flushed = self.text


def test_text_appears_as_it_is_drawn_and_in_whole_characters(tiny_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run()
    recorder = Recorder()
    shown: list[str] = []

    def scripted(*_arguments: Any, **_options: Any) -> Iterator[Drawn]:
        shown.append(recorder.flushed)
        for byte in "è 🎉!".encode() + b"\xf0\x9f":  # ends within a character
            yield drawn(byte)
            shown.append(recorder.flushed)

    monkeypatch.setattr("scalegpt.inference.continuations.draw_rows", scripted)
    monkeypatch.setattr(sys, "stdout", recorder)
    assert main(["sample", str(run), "--prompt", ">", "--device", "cpu", "--max_new_tokens", "10"]) == 0
    assert shown == [">", ">", ">è", ">è ", ">è ", ">è ", ">è ", ">è 🎉", ">è 🎉!", ">è 🎉!"]
    assert recorder.text == f">è 🎉!{REPLACEMENT}\n"


def test_the_end_of_the_text_ends_the_sample_and_is_not_shown(
    tiny_run: Any, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run()
    seen: dict[str, Any] = {}

    def scripted(_model: Any, _config: Any, prompt: torch.Tensor, _settings: Any, **options: Any) -> Iterator[Drawn]:
        seen.update(options, prompt=prompt.tolist())
        yield from map(drawn, (104, 105, 256))

    monkeypatch.setattr("scalegpt.inference.continuations.draw_rows", scripted)
    assert sample(run) == "hi\n"
    assert seen == {"prompt": [[256]], "seeds": [1337], "stop_token": 256, "limit_vocab": 257}
    (line,) = lines_of(sample(run, "--json"))
    assert (line["continuation"], line["tokens"], line["finish_reason"]) == ("hi", 3, "end_of_text")
    assert line["logprob"] == -1.5


def test_without_a_prompt_a_char_model_starts_at_a_newline(letters: Path, sample: Sample) -> None:
    assert sample(letters, "--temperature", "0", "--max_new_tokens", "30") == sample(
        letters, "--prompt", "\n", "--temperature", "0", "--max_new_tokens", "30"
    ).removeprefix("\n")


def test_the_prompt_may_be_a_file(letters: Path, sample: Sample, tmp_path: Path) -> None:
    file = tmp_path / "start.txt"
    file.write_text("è\n", encoding="utf-8")
    words = ("--max_new_tokens", "20")
    assert sample(letters, "--prompt_file", str(file), *words) == sample(letters, "--prompt", "è\n", *words)


def feed(monkeypatch: pytest.MonkeyPatch, content: bytes, tmp_path: Path) -> None:
    """Put content on standard input."""
    (tmp_path / "input").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", (tmp_path / "input").open(encoding="utf-8"))


@pytest.mark.parametrize("flags", [(), ("--prompt", "-"), ("--prompt_file", "-")])
@pytest.mark.parametrize("content", [b"once\n", b"\xef\xbb\xbfonce\r\n", b"once"])
def test_the_prompt_may_come_from_standard_input(
    letters: Path, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: Any, content: bytes
) -> None:
    feed(monkeypatch, content, tmp_path)
    told = json.loads(sample(letters, *flags, "--max_new_tokens", "2", "--json"))
    assert told["prompt"] == "once"


def test_with_a_prompt_standard_input_is_not_read(
    letters: Path, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(monkeypatch, b"twice", tmp_path)
    assert json.loads(sample(letters, "--prompt", "once", "--max_new_tokens", "2", "--json"))["prompt"] == "once"
    assert sys.stdin.read() == "twice"


def test_without_anything_on_standard_input_there_is_no_prompt(
    letters: Path, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path("/dev/null").open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert json.loads(sample(letters, "--max_new_tokens", "2", "--json"))["prompt"] == ""


def test_standard_input_that_is_no_text_is_refused(
    letters: Path, refused: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(monkeypatch, b"ab\xff", tmp_path)
    assert "standard input is not UTF-8 at byte 2" in refused(letters)


def test_a_byte_order_mark_in_a_prompt_file_is_dropped(letters: Path, sample: Sample, tmp_path: Path) -> None:
    (tmp_path / "start.txt").write_bytes(b"\xef\xbb\xbfonce")
    told = json.loads(sample(letters, "--prompt_file", str(tmp_path / "start.txt"), "--max_new_tokens", "2", "--json"))
    assert told["prompt"] == "once"


def test_a_prompt_longer_than_the_block_is_cropped_with_a_note(
    letters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long, words = "abcdefgh" * 5, ["--json", "--device", "cpu", "--max_new_tokens", "10"]
    assert main(["sample", str(letters), "--prompt", long, *words]) == 0
    captured = capsys.readouterr()
    assert "the prompt has 40 tokens; the model sees the last 16" in captured.err
    assert main(["sample", str(letters), "--prompt", long[-16:], *words]) == 0
    assert json.loads(capsys.readouterr().out)["continuation"] == json.loads(captured.out)["continuation"]


def test_the_speed_is_on_standard_error(letters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(letters), "--max-new-tokens", "5", "--device", "cpu"]) == 0
    assert "5 tokens, " in capsys.readouterr().err


def test_a_terminal_without_unicode_gets_question_marks(letters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["sample", str(letters), "--prompt", "è", "--max_new_tokens", "2", "--device", "cpu"]) == 0
    sys.stdout.flush()
    assert raw.getvalue().startswith(b"?")


def test_error_lines(letters: Path, refused: Sample, tmp_path: Path) -> None:
    assert "did you mean tiny?" in refused(letters.with_name("tinny"))
    assert "'!' (U+0021)" in refused(letters, "--prompt", "a!", "--device", "cpu")
    assert "not both" in refused(letters, "--prompt", "a", "--prompt_file", "b")
    assert "give --prompt or --prompts_file, not both" in refused(letters, "--prompt", "a", "--prompts_file", "b")
    assert "give --prompt or --interactive, not both" in refused(letters, "--prompt", "a", "--interactive")
    assert "give --interactive or --json, not both" in refused(letters, "--interactive", "--json")
    assert "stop must not be empty" in refused(letters, "--stop", "")
    assert "No such file" in refused(letters, "--prompt_file", tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"citt\xe0")
    assert "not UTF-8 at byte 4" in refused(letters, "--prompt_file", tmp_path / "latin.txt")
    assert "did you mean --temperature?" in refused(letters, "--temprature", "1")
    assert "top_p must be at most 1" in refused(letters, "--top_p", "1.5")
    assert "max_new_tokens" in refused(letters, "--max_new_tokens", "many")
    assert "did you mean cpu?" in refused(letters, "--device", "gpu")
    assert "RUN" in refused()


def test_a_vocabulary_without_a_newline_asks_for_a_prompt(tiny_run: Any, refused: Sample) -> None:
    run = tiny_run(tokenizer=make_tokenizer("char", "abc"))
    assert "give a prompt" in refused(run, "--device", "cpu")


def test_a_diverged_model_fails_in_one_line(
    tiny_run: Any, capsys: pytest.CaptureFixture[str], tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run()
    monkeypatch.setattr("scalegpt.model.gpt.GPT.forward", lambda *_: torch.full((1, 257), float("nan")))
    assert main(["sample", str(run), "--prompt", "a", "--device", "cpu", "--json"]) == 1
    assert "diverged" in capsys.readouterr().err


def test_a_run_that_deletes_its_checkpoint_is_sampled_from_the_newest(
    tiny_run: Any, sample: Sample, refused: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(steps=(10, 20))
    words = ("--prompt", "a", "--max_new_tokens", "5", "--json")
    old = replaced_at("_check", run, monkeypatch)
    assert json.loads(sample(run, *words))["step"] == 20
    assert f"run {run} has no checkpoint step_00000010; it has step_00000020" in refused(old, *words)


def test_help_shows_examples_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["sample", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.index("scalegpt sample runs/tiny --prompt") < text.index("usage:")
    assert "--max_new_tokens" in text
