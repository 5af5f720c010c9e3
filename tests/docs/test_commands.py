"""Every command in the documents works: it is run here on a small model, or its flags are those of its program.

Commands in blocks that need neither a launcher nor hours are run, training ones with a small model. ``tests/launch`` runs
the launchers; benchmarks take minutes, so that their flags alone are compared with their sources.
"""

import gzip
import io
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from interop.public_models import PUBLIC
from scalegpt.cli.main import main
from scalegpt.cli.sample import SampleSettings
from scalegpt.cli.train import make_parser
from scalegpt.config import ModelConfig
from scalegpt.config.machine import MachineConfig
from scalegpt.data.tokenizers import make_tokenizer
from scalegpt.data.tokenizers.export import tokenizer_files
from scalegpt.interop.families import as_config
from scalegpt.weights.layouts import targets
from scalegpt.weights.table import HUGGING_FACE

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    path.relative_to(ROOT)
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/*.md", "configs/*.md", "examples/*.md")
    for path in sorted(ROOT.glob(pattern))
]
TRAINERS = {"launch/train.py", "scalegpt.train"}
SHAPE = "--n_layer 1 --n_embd 8 --n_head 1 --block_size 16 --vocab_size 257 --tokenizer byte"
STEP = "--micro_batch 2 --tokens_per_step 32 --max_iters 1 --warmup_steps 0 --sample_tokens 0"
ONE_STEP = [*STEP.split(), "--device", "cpu", "--precision", "fp32", "--backend", "plain"]
SMALL = [*SHAPE.split(), *ONE_STEP, "--fresh"]
MODEL = "models/SmolLM2-135M"
"""A Hugging Face folder that the documents name."""

PLACEHOLDERS = {
    "FILES_OR_FOLDERS…": "my_text.txt", "100:102": "1:1", "20:22": "1:1", "8192": "265",
    "s3://BUCKET/FOLDER": "elsewhere", "s3://BUCKET/FOLDER/mine": "elsewhere/mine",
}  # fmt: skip
"""What a reader puts in the place of a word."""

SERVING = {"--ui", "--live"}
"""Flags with which a command serves a page until Ctrl-C; tests/plan_page and tests/cli run these."""

OTHERS = ("pip install ", "pre-commit ", "python -m json.tool")
"""Programs that are not ours."""

BEGINNING = (
    r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:scalegpt|python|torchrun|deepspeed|make|pytest|pip|pre-commit|echo)\s+\S"
)
"""How a command begins."""


def blocks(page: str) -> Iterator[str]:
    """The commands of the blocks without a language, and of ``console`` ones."""
    for language, text in re.findall(r"^ *```(\w*)\n(.*?)^ *```", page, re.DOTALL | re.MULTILINE):
        if language not in {"", "console"}:
            continue
        for line in re.sub(r"\\\n\s*", "", text).splitlines():
            command = re.split(r"\s{2,}#", line.strip().removeprefix("$ "))[0]
            if re.match(BEGINNING, command) and (language == "" or line.strip().startswith("$ ")):
                yield from command.split(" && ")


def spans(page: str) -> Iterator[str]:
    """What is code in the text and begins as a command does."""
    prose = re.sub(r"^ *```.*?^ *```", "", page, flags=re.DOTALL | re.MULTILINE)
    texts = (" ".join(words.split()) for words in re.findall(r"`([^`]+)`", prose))
    yield from (text for text in texts if re.match(BEGINNING, text))


def program(command: str) -> list[str]:
    """The words of the last program of a pipe, without assignments and ``.venv/bin/``."""
    words = shlex.split(command.rsplit(" | ", 1)[-1].replace(" …", ""))
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    return [word.removeprefix(".venv/bin/") for word in words]


def commands_of(page: Path) -> list[list[str]]:
    return [program(command) for command in blocks((ROOT / page).read_text(encoding="utf-8"))]


def known(command: str) -> str:
    """A text with all flags of one of our commands."""
    folder = ROOT / "scalegpt" / "cli"
    sources = [path.read_text() for path in folder.rglob("*.py") if command in str(path.relative_to(folder))]
    settings = [f"--{name}" for section in (MachineConfig, SampleSettings) for name in section.settings()]
    return "\n".join([*sources, make_parser().format_help(), *settings])


def has_flags(words: list[str], text: str) -> bool:
    flags = [word.split("=")[0].removeprefix("--").replace("-", "_") for word in words if re.match(r"--[a-z]", word)]
    return all(re.search(rf"--{flag}\b", text) for flag in flags)


def check_names(words: list[str]) -> None:
    """Compare a command's flags and files with what there is."""
    name = words[0]
    if name == "make":
        targets = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{word}:", targets, re.MULTILINE) for word in words[1:] if "=" not in word), words
    elif name == "scalegpt":
        assert words[1] in {"COMMAND", "--version"} or has_flags(words, known(words[1])), words
    elif TRAINERS & set(words):
        place = next(i for i, word in enumerate(words) if word in TRAINERS)
        assert has_flags(words[place:], known("train")), words
    elif name == "python" and words[1].startswith(("benchmarks/", "tests/", "examples/")):
        assert (ROOT / words[1]).is_file() or Path(words[1]).stem == "NAME", words
        sources = [path.read_text() for path in (ROOT / words[1].split("/")[0]).rglob("*.py")]
        assert has_flags(words, "\n".join(sources) + known("train")), words
    elif name == "pytest":
        assert (ROOT / words[1].split("::")[0]).exists(), words
    else:
        assert " ".join(words).startswith(OTHERS), words


def is_run(words: list[str]) -> bool:
    """Whether a command is run here: ours, and training without a launcher, but none that serves a page until Ctrl-C."""
    if SERVING & set(words):
        return False
    return words[0] == "scalegpt" or (words[0] == "python" and bool(TRAINERS & set(words)))


def run(words: list[str]) -> int:
    words = [PLACEHOLDERS.get(word, word) for word in words]
    if words[:2] == ["scalegpt", "train"]:
        has_shape = bool({MODEL, "smol"} & set(words))
        return main(["train", *words[2:], *(["--block_size", "16", *ONE_STEP] if has_shape else SMALL)])
    if words[0] == "scalegpt":
        return main(words[1:])
    place = next(i for i, word in enumerate(words) if word in TRAINERS)
    return main(["train", *words[place + 1 :], *SMALL])


def write_model(folder: Path) -> None:
    """A small Hugging Face folder with a tokenizer."""
    model = ModelConfig(n_layer=1, n_embd=8, n_head=1, block_size=16, vocab_size=257, bias=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(as_config(model)))
    wanted = targets(model, HUGGING_FACE["gpt2"])
    save_file({target.name: torch.ones(target.shape) for target in wanted}, folder / "model.safetensors")
    for name, content in tokenizer_files(make_tokenizer("byte")).items():
        (folder / name).write_bytes(content)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """A folder with what the documents' commands name: texts, configurations, runs with a checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    Path("data").mkdir()
    for name in ("my_text.txt", "your_text.txt", "data/one.txt"):
        Path(name).write_text("a text to train on, line by line\n" * 200, encoding="utf-8")
    lines = "".join(json.dumps({"doc": {"text": f"the text of record {number}"}}) + "\n" for number in range(100))
    Path("dump.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    Path("my_code").mkdir()
    Path("my_code/main.c").write_text("int main(void) { return 0; }\n" * 200, encoding="utf-8")
    Path("my_notes.yaml").write_text("model: {n_layer: 2}\n", encoding="utf-8")
    Path("models/Llama-3.2-1B").mkdir(parents=True)
    Path("models/Llama-3.2-1B/config.json").write_text(json.dumps(PUBLIC["Llama-3.2-1B"].config), encoding="utf-8")
    write_model(Path(MODEL))
    for name in ("NAME", "small"):
        flags = ["--preset", "tiny", "--input_file", "my_text.txt", "--model_name", name]
        assert main(["train", *flags, *SMALL]) == 0


@pytest.mark.parametrize("page", [page for page in PAGES if any(map(is_run, commands_of(page)))], ids=str)
def test_commands_of_the_blocks_run(
    page: Path, workplace: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in filter(is_run, commands_of(page)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n" * 40)))
        status = run(words)
        assert status == 0 or (words[1] == "plan" and status == 3), (words, capsys.readouterr().err)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_have_known_flags(page: Path) -> None:
    for words in [*commands_of(page), *map(program, spans((ROOT / page).read_text(encoding="utf-8")))]:
        check_names(words)


@pytest.mark.parametrize(
    "command",
    [
        "scalegpt plan --no_such_flag", "python benchmarks/nothing.py", "make nothing", "pytest tests/nothing.py", "rm -r x",
        "torchrun --nproc_per_node 2 launch/train.py --presets tiny", "scalegpt params --preset tiny --formula",
    ],
)  # fmt: skip
def test_a_command_that_does_not_exist_is_found(command: str) -> None:
    with pytest.raises(AssertionError):
        check_names(program(command))


def test_there_are_commands_of_each_kind() -> None:
    found = [words for page in PAGES for words in commands_of(page)]
    assert {"scalegpt", "python", "torchrun", "deepspeed", "make"} <= {words[0] for words in found}
    assert sum(map(is_run, found)) > 20
