"""``scalegpt data train-tokenizer``: a byte-level BPE of the user's own text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scalegpt import storage
from scalegpt.cli.main import main
from scalegpt.config import DataConfig
from scalegpt.config.tokenizer import parse_tokenizer, vocabulary
from scalegpt.data import tokenizer_training as module
from scalegpt.data.tokenizer_training import train_tokenizer
from scalegpt.data.tokenizers import huggingface, load_tokenizer
from scalegpt.data.tokenizers.fast import fast_encoder
from scalegpt.data.tokenizers.letters import LETTERS
from scalegpt.errors import InputError

library = pytest.importorskip("tokenizers")

SOURCE = Path(storage.__file__)
UNUSUAL = "è 日本語 😀\r\n\t\x00"


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def command(out: Path, *words: str, inputs: str = str(SOURCE)) -> list[str]:
    return ["data", "train-tokenizer", "--input_file", inputs, "--out", str(out), *words]


def test_it_is_what_the_package_would_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PART_CHARACTERS", 300)
    made = train_tokenizer([SOURCE], tmp_path / "tok", 700, DataConfig())
    other = library.Tokenizer(library.models.BPE())
    other.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = library.trainers.BpeTrainer(
        vocab_size=700, min_frequency=2, special_tokens=["<|endoftext|>"], initial_alphabet=sorted(LETTERS),
        show_progress=False,
    )  # fmt: skip
    text = SOURCE.read_text(encoding="utf-8")
    other.train_from_iterator([text], trainer)
    assert vocabulary(parse_tokenizer(made.files["tokenizer.json"])) == other.get_vocab()
    assert made.encode(text).tolist() == other.encode(text).ids
    assert (made.vocab_size, made.end_token, made.end_of_text) == (700, "<|endoftext|>", 0)
    assert made.decode(made.encode(UNUSUAL)) == UNUSUAL


def test_transformers_loads_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    assert main(command(tmp_path / "tok", "--vocab", "600", "--json")) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["vocab_size"], facts["end_of_text"]) == (600, "<|endoftext|>")
    assert left(tmp_path / "tok") == ["tokenizer.json", "tokenizer_config.json"]
    other = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "tok"), local_files_only=True)
    ours = load_tokenizer(str(tmp_path / "tok"))
    text = SOURCE.read_text(encoding="utf-8") + UNUSUAL
    assert other(text)["input_ids"] == ours.encode(text).tolist()
    assert other.decode(ours.encode(text).tolist()) == text
    assert (len(other), other.eos_token_id) == (600, 0)
    document = parse_tokenizer(ours.files["tokenizer.json"])
    assert (
        fast_encoder(document, vocabulary(document), huggingface.library_of(ours.files["tokenizer.json"])) is not None
    )


def test_the_same_text_gives_the_same_file(tmp_path: Path) -> None:
    for number in range(3):
        words = [sys.executable, "-m", "scalegpt", *command(tmp_path / str(number), "--vocab", "900")]
        subprocess.run(words, check=True, capture_output=True)
    assert len({(tmp_path / str(number) / "tokenizer.json").read_bytes() for number in range(3)}) == 1


def test_text_is_read_by_the_rules_of_all_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(("perché così è più " * 30).encode("latin-1"))
    (tmp_path / "in" / "b.bin").write_bytes(b"\0")
    assert main(command(tmp_path / "t", "--vocab", "262", inputs=str(tmp_path / "in"))) == 2
    assert "holds no text in utf-8" in capsys.readouterr().err
    assert main(command(tmp_path / "t", "--vocab", "262", "--encoding", "latin-1", inputs=str(tmp_path / "in"))) == 0
    ids = load_tokenizer(str(tmp_path / "t")).encode("perché").tolist()
    assert len(ids) < len("perché".encode())


def test_too_little_text_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("one two two")  # only the three merges of " two" occur twice
    for vocab in ("300", "261"):
        assert main(command(tmp_path / "tok", "--vocab", vocab, inputs=str(tmp_path / "a.txt"))) == 2
        line = capsys.readouterr().err
        assert "a.txt gives only 260 tokens that occur at least 2 times" in line
        assert "--vocab 260 or less" in line
        assert line.count("\n") == 1
    assert left(tmp_path) == ["a.txt"]
    assert main(command(tmp_path / "tok", "--vocab", "260", inputs=str(tmp_path / "a.txt"))) == 0


def test_what_is_there_already_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tok").mkdir()
    assert main(command(tmp_path / "tok", "--vocab", "300")) == 0  # an empty folder is as good as none
    before = (tmp_path / "tok" / "tokenizer.json").read_bytes()
    for out in (tmp_path / "tok", tmp_path / "tok" / "tokenizer.json"):
        assert main(command(out, "--vocab", "301")) == 2
        assert "already holds something; choose another --out" in capsys.readouterr().err
    assert (tmp_path / "tok" / "tokenizer.json").read_bytes() == before
    assert main(command(tmp_path / "tok" / "tokenizer.json" / "x", "--vocab", "301")) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("vocab", ["256", "1_000_001", "many"])
def test_vocabularies_that_cannot_be(vocab: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path / "tok", "--vocab", vocab)) == 2
    assert "vocab must be" in capsys.readouterr().err
    assert left(tmp_path) == []


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int, tokens: int = 0) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tokenizer([SOURCE], tmp_path / "tok", 300, DataConfig(), progress=interrupt)
    assert left(tmp_path) == []


def test_a_file_that_changes_meanwhile_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text " * 100)
    other = tmp_path / "b.txt"
    other.write_text("more text " * 100)

    def change(done: int, total: int, tokens: int = 0) -> None:
        other.write_text("changed")

    with pytest.raises(InputError, match="changed while it was read"):
        train_tokenizer([path, other], tmp_path / "tok", 300, DataConfig(), progress=change)
    assert left(tmp_path) == ["a.txt", "b.txt"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(file: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(module, "sync_file", full)
    with pytest.raises(InputError, match="no disk space is left"):
        train_tokenizer([SOURCE], tmp_path / "tok", 300, DataConfig())
    assert left(tmp_path) == []


def test_without_the_package_one_line_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['tokenizers'] = None\n"
        "from scalegpt.cli.main import main\n"
        f"sys.exit(main({command(tmp_path / 'tok')!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "training a tokenizer needs the package tokenizers: pip install 'scalegpt[hf]'" in done.stderr
    assert left(tmp_path) == []
