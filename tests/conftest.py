"""Fixtures that several folders share."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import processors
from scalegpt.cli.main import main

os.environ["SCALEGPT_GPUS"] = ""  # a developer's own catalogue is none of the tests' business
os.environ["SCALEGPT_PROCESSORS"] = processors.shared_file()  # no test waits until this processor is measured
# What nohup or a shell's background ignores, the processes of tests would inherit.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = {"n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 16, "vocab_size": 61}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models this small, threads only wait for each other: on a busy machine ten times as long as they compute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the folders of text ``prose`` and ``code``, and a cache of its own."""
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name, text in (("prose", "Tomorrow, and tomorrow, and tomorrow. "), ("code", "def f(x):\n    return x\n")):
        Path(name).mkdir()
        Path(name, "text.txt").write_text(text * 120)
    return tmp_path


@pytest.fixture
def tiny_model(one_thread: None) -> Callable[..., Any]:
    """A factory of small GPTs with their initial weights; keywords change the shape, the loss and the seed."""

    def make(*, seed: int = 0, loss: Any = None, **shape: Any) -> Any:
        import torch

        from scalegpt.config import ModelConfig
        from scalegpt.model.gpt import GPT
        from scalegpt.model.loss import full_cross_entropy

        model = GPT(ModelConfig(**{**TINY, **shape}), loss or full_cross_entropy)
        with torch.no_grad():
            for name, value in model.initial_weights(seed):
                model.get_parameter(name).copy_(value)
        return model

    return make


@pytest.fixture
def tiny_run(tmp_path: Path, tiny_model: Callable[..., Any]) -> Callable[..., Path]:
    """A factory of run folders with untrained checkpoints, as training leaves them."""

    def make(
        name: str = "tiny",
        *,
        tokenizer: Any = None,
        steps: tuple[int, ...] = (10,),
        train: Any = None,
        change: Callable[[Any], None] = lambda _: None,
        **shape: Any,
    ) -> Path:
        from checkpoint.samples import save_alone
        from scalegpt.backends.base import WEIGHT, Piece
        from scalegpt.checkpoint.manifest import Header, Progress
        from scalegpt.config.presets import as_file, resolve
        from scalegpt.data.tokenizers import make_tokenizer

        tokenizer = tokenizer or make_tokenizer("byte")
        run_folder = tmp_path / name
        (run_folder / "checkpoints").mkdir(parents=True)
        for step in steps:
            model = tiny_model(**{"seed": step, "vocab_size": tokenizer.padded_vocab_size, **shape})
            change(model)
            flags = {key: getattr(model.config, key) for key in type(model.config).settings()}
            config = as_file(resolve(flags={**flags, **(train or {})}, name=name))
            header = Header(Progress(step=step, tokens=step * 100, sequences=step * 6), config, tokenizer.as_dict())
            pieces = [Piece(key, WEIGHT, 0, value.detach().view(-1)) for key, value in model.named_parameters()]
            shapes = {f"{WEIGHT}/{key}": shape for key, shape in model.shapes.items()}
            save_alone(run_folder / "checkpoints", header, pieces, shapes)
        return run_folder

    return make


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs a command; it returns what the command prints or, where ``status`` is not 0, its error line."""

    def run(*words: Any, status: int = 0) -> str:
        code = main(list(map(str, words)))
        seen = capsys.readouterr()
        assert code == status, seen.out + seen.err
        return seen.out if not status else seen.err

    return run
