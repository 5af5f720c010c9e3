"""Preparing a run: names, the number of steps, and what is resolved, checked and built."""

from pathlib import Path
from typing import Any

import pytest
import torch

from earlier_tokens import made_before
from scalegpt.backends import World
from scalegpt.config import DataConfig, TrainConfig
from scalegpt.config.presets import resolve
from scalegpt.data.prepare import prepare as prepare_text
from scalegpt.data.shards import open_tokens
from scalegpt.errors import InputError
from scalegpt.hardware.gpus import find_card
from scalegpt.hardware.machine import Machine
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.plan import make_plan
from scalegpt.training.job import Job
from scalegpt.training.output.logger import Logger
from scalegpt.training.request import Request
from scalegpt.training.resilience.stopping import StopRequest
from scalegpt.training.runs.summary import plan_summary, total_steps
from scalegpt.training.setup import data
from scalegpt.training.setup import prepare as setup
from scalegpt.training.setup.data import prepare_data
from scalegpt.training.setup.prepare import prepare
from scalegpt.training.setup.resolve import check_name

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
FLAGS = {
    "tokenizer": "byte", "vocab_size": 0, "n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 16, "micro_batch": 4,
    "max_iters": 3, "precision": "fp32",
}  # fmt: skip


class OneOfTwo(World):
    """The first of two ranks that have not met."""

    def on_first(self, work: Any) -> Any:
        return work()


@pytest.fixture
def request_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Any:
    """A factory of requests on a small text."""
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("abcdefgh\n" * 60)

    def make(*, fresh: bool = False, micro_fixed: bool = False, **flags: Any) -> Request:
        run = resolve(flags={**FLAGS, "input_file": str(tmp_path / "text.txt"), **flags}, name="run")
        return Request(run, tmp_path / "runs", fresh, frozenset({"micro_batch"} if micro_fixed else {}))

    return make


@pytest.mark.parametrize("name", ["a", "150M_1024", "v1.2-b", "0"])
def test_plain_names_are_taken(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "/a", "a\\b", "a b", "-x", "é", "a\n", "a\0"])
def test_names_that_are_no_plain_folder_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="--model_name"):
        check_name(name)


@pytest.mark.parametrize("length", [201, 256, 100_000])
def test_names_that_are_too_long_for_a_folder_are_refused_in_a_line(length: int) -> None:
    check_name("a" * 200)
    with pytest.raises(InputError, match="characters; give a --model_name of at most 200") as raised:
        check_name("a" * length)
    assert len(str(raised.value)) < 120


@pytest.mark.parametrize(
    ("iters", "tokens", "steps"),
    [(10, None, 10), (None, 1000, 10), (None, 1001, 11), (10, 10**9, 10), (10, 300, 3), (0, 1, 0)],
)
def test_steps_until_whichever_limit_comes_first(iters: int | None, tokens: int | None, steps: int) -> None:
    assert total_steps(TrainConfig(max_iters=iters, max_tokens=tokens), BatchPlan(5, 2, 1, 10)) == steps


def test_a_job_has_everything_resolved(request_for: Any, capsys: pytest.CaptureFixture[str]) -> None:
    job = prepare(request_for(precision="auto", micro_batch=12, tokens_per_step=16 * 10), ALONE)
    assert isinstance(job, Job)
    train = job.run.train
    assert train.precision in {"fp32", "bf16"}
    assert (train.micro_batch, train.tokens_per_step, job.batch_plan) == (10, 160, BatchPlan(10, 1, 1, 16))
    assert job.run.model.vocab_size == job.data.tokenizer.padded_vocab_size == 257
    assert job.run.parallel.zero_stage == 0
    assert (job.progress.step, job.resumed, job.total_steps) == (0, False, 3)
    assert job.prompt == [256]  # the end of a text
    out = capsys.readouterr().out
    assert "micro batch 10 rather than 12" in out
    expected = dict(job.backend.model.initial_weights(train.seed))
    for name, value in job.backend.model.named_parameters():
        assert torch.equal(value, expected[name])
    left = {path.name for path in job.directory.path.iterdir()}
    assert left == {".lock", ".run_id", "checkpoints", "config.yaml", "data_ledger.jsonl", "plan.json"}


def test_a_run_of_an_earlier_release_keeps_its_tokens(
    request_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = made_before(tmp_path / "text.txt", tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    request, logger = request_for(), Logger(speaks=True, total=1, every=1)
    monkeypatch.setattr(data, "tokens_to_keep", lambda _: {request.run.data.input_file: digest})
    kept = prepare_data(request, ALONE, logger, StopRequest())
    assert (kept.digest, kept.tokens.sources[0].tokens.path) == (digest, folder)
    monkeypatch.setattr(data, "tokens_to_keep", lambda _: None)
    assert prepare_data(request, ALONE, logger, StopRequest()).digest != digest


@pytest.mark.parametrize(
    ("flags", "times"),
    [({}, 1), ({"tokenizer": "gpt2", "vocab_size": 0}, 1), ({"tokenizer": "char"}, 2), ({"input_file": "prepared"}, 1)],
)
def test_a_layout_is_planned_once_unless_only_the_text_knows_the_vocabulary(
    request_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], times: int
) -> None:
    if "input_file" in flags:
        (tmp_path / "more.txt").write_text("abcdefgh" * 100)
        prepared = prepare_text([tmp_path / "more.txt"], tmp_path / "prepared", DataConfig(tokenizer="byte"))
        flags = {"input_file": str(prepared.path)}
        flags |= {"tokenizer": "gpt2"}  # by default; that of the prepared tokens counts
    planned, real = [], setup.choose_layout
    monkeypatch.setattr(setup, "choose_layout", lambda run, *a, **o: planned.append(run.model) or real(run, *a, **o))
    job = prepare(request_for(**flags), ALONE)
    assert len(planned) == times
    assert planned[-1] == job.run.model == job.plan.run.model
    assert job.run.model.vocab_size == job.data.tokenizer.padded_vocab_size


def test_a_run_that_cannot_fit_is_refused_before_its_data_are_read(
    request_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "prepare_mixture", pytest.fail)
    with pytest.raises(InputError, match="does not fit"):
        prepare(request_for(n_layer=400, n_embd=16384, n_head=128), ALONE)


def test_the_encodings_are_printed(request_for: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_bytes("Früher hörte man schöne Mädchen über Äpfel reden.\n".encode("latin-1") * 20)
    prepare(request_for(encoding="auto"), ALONE)
    assert "byte tokenizer, read as iso8859-1;" in capsys.readouterr().out


def test_a_prompt_comes_from_the_settings_or_the_data(request_for: Any) -> None:
    assert prepare(request_for(sample_prompt="ab"), ALONE).prompt == [97, 98]
    char = prepare(request_for(tokenizer="char", fresh=True), ALONE)
    assert char.prompt == [int(char.data.val.parts[0][0])]


def test_a_prompt_past_a_small_vocabulary_is_refused(request_for: Any, tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"  # nanoGPT's files without a sidecar hold GPT-2's ids
    folder.mkdir()
    for split in ("train", "val"):
        (folder / f"{split}.bin").write_bytes(bytes([5, 0] * 100))
    assert open_tokens(folder).tokenizer.kind == "gpt2"
    request = request_for(input_file=str(folder), vocab_size=100)
    assert prepare(request, ALONE).prompt == [5]
    with pytest.raises(InputError, match="outside the vocabulary of 100; give another --sample_prompt"):
        prepare(request_for(input_file=str(folder), vocab_size=100, sample_prompt="hello world"), ALONE)


def test_a_vocabulary_without_the_end_of_text_is_refused_before_text_is_read(
    request_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scalegpt.data.prepare.survey", None)
    with pytest.raises(
        InputError, match="gpt2 tokenizer ends documents with id 50,256, outside the vocabulary of 50,256"
    ):
        prepare(request_for(tokenizer="gpt2", vocab_size=50_256), ALONE)


def test_one_process_is_all_that_plain_takes(request_for: Any) -> None:
    with pytest.raises(InputError, match="plain runs in one process, not 2; use --backend fsdp"):
        prepare(request_for(), OneOfTwo(0, 2, 0, 2, torch.device("cpu")))


def test_a_compiler_that_is_not_there_is_a_warning(
    request_for: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scalegpt.backends.capabilities._lacking_compiler", lambda: "there is no C++ compiler (g++)")
    prepare(request_for(compile="on"), ALONE)
    assert "warning: compile: there is no C++ compiler (g++); the blocks run uncompiled" in capsys.readouterr().out


def test_the_plan_tells_the_layout() -> None:
    run = resolve(flags={"precision": "bf16", "backend": "fsdp"}, name="run")
    plan = make_plan(run, Machine.with_card(find_card("a100-40gb"), gpus=4), BatchPlan(8, 2, 4, 256))
    summary = plan_summary(run, plan, ALONE, {"zero": 1})
    assert (summary["grad_accum"], summary["tokens_per_step"], summary["deepspeed"]) == (2, 16384, {"zero": 1})
    assert summary["memory"] == plan.memory()
    assert sum(summary["model_state_bytes"].values()) == 16 * summary["parameters"]
