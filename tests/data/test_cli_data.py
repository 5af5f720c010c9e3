import json
import subprocess
import sys

import pytest

from scalegpt.cli import data as command
from scalegpt.cli.main import main
from scalegpt.errors import InputError
from token_files import write_datatrove, write_llmc, write_megatron


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Tomorrow, and tomorrow, and tomorrow.\n" * 30)
    return path


def test_prepare_and_inspect(text, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert command.main(["prepare", str(text), "--out", out, "--tokenizer", "char", "--val-fraction", "0.2"]) == 0
    shown = capsys.readouterr().out
    assert "912 tokens" in shown
    assert "228 tokens, 20.0%" in shown
    assert command.main(["inspect", out]) == 0
    shown = capsys.readouterr().out
    assert "'Tomorrow, and tomorrow" in shown
    assert "every id" in shown


def test_json(text, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert command.main(["prepare", str(text), "--out", out, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["tokenizer"], made["vocab_size"], made["padded_vocab_size"]) == ("gpt2", 50257, 50304)
    assert command.main(["inspect", out, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["train_text"].startswith("Tomorrow")
    assert {key: seen[key] for key in made} == made


def test_help_shows_an_example_first(capsys):
    assert command.main(["--help"]) == 0
    assert capsys.readouterr().out.index("example") < 50
    assert command.main([]) == 2
    capsys.readouterr()
    for action in ("prepare", "inspect"):
        with pytest.raises(SystemExit) as stopped:
            command.main([action, "--help"])
        assert stopped.value.code == 0
        shown = capsys.readouterr().out
        assert shown.index("example:") < shown.index("usage:")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prepair"], "did you mean prepare"),
        (["prepare", "x"], "--out"),
        (["prepare", "x", "--out", "y", "--tokeniser", "byte"], "did you mean --tokenizer"),
        (["prepare", "x", "--out", "y", "--tokenizer", "bite"], "did you mean byte"),
        (["prepare", "x", "--out", "y", "--val_fraction", "2"], "val_fraction must be less than 1"),
        (["prepare", "missing.txt", "--out", "y"], "does not exist"),
        (["inspect", "missing"], "input missing does not exist"),
    ],
)
def test_bad_input(words, message):
    with pytest.raises(InputError, match=message):
        command.main(words)


def test_inspect_finds_changed_tokens(text, tmp_path):
    out = tmp_path / "out"
    command.main(["prepare", str(text), "--out", str(out), "--tokenizer", "byte"])
    (out / "train.bin").write_bytes(b"\xff" * (out / "train.bin").stat().st_size)
    with pytest.raises(InputError, match="has changed"):
        command.main(["inspect", str(out)])


def test_errors_are_one_line_and_status_2(tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9 au lait\n")
    assert main(["data", "prepare", str(path), "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "not UTF-8" in shown
    assert not (tmp_path / "out").exists()


def test_progress_line_is_rewritten_at_most_ten_times_a_second(capsys):
    times = iter([0.0, 1.0, 1.05, 1.2, 1.21])
    line = command._ProgressLine("tokenising", lambda: next(times))
    for done in (1, 2, 3, 10):
        line(done * 10**6, 10 * 10**6)
    line.clear()
    shown = capsys.readouterr().err
    assert shown.count("tokenising") == 3
    assert "100%  10.0 of 10.0 MB" in shown
    assert shown.endswith("\r\x1b[K")


def test_nothing_heavy_is_imported_for_help():
    code = "import sys; from scalegpt.cli import data; data.main(['-h']); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"'numpy'", "'torch'", "'tiktoken'"} & set(loaded.strip("[]\n").split(", "))


def test_no_torch_in_the_data_package():
    code = (
        "import sys\n"
        "from scalegpt.data import prepare, shards, tokenizers\n"
        "from scalegpt.data.text import corpus\n"
        "from scalegpt.data.windows import mixture\n"
        "tokenizers.make_tokenizer('gpt2').encode('x')\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def inspected(capsys, *words):
    """What inspect says in words, and its JSON."""
    capsys.readouterr()
    assert command.main(["inspect", *words]) == 0
    shown = capsys.readouterr().out
    assert command.main(["inspect", *words, "--json"]) == 0
    return shown, json.loads(capsys.readouterr().out)


def test_inspect_says_what_tokens_of_other_programs_are(tmp_path, capsys):
    documents = [[97 + number % 26] * 9 + [256] for number in range(40)]
    prefix = str(write_megatron(tmp_path / "my_document", [[each] for each in documents]))
    shown, facts = inspected(capsys, prefix)
    assert "tokenizer        unknown; give it with --tokenizer" in shown
    assert "ids              97 to 256\n" in shown
    assert (facts["format"], facts["train_tokens"], facts["documents"]) == ("Megatron", 400, 40)
    shown, facts = inspected(capsys, prefix, "--tokenizer", "byte")
    assert "97 to 256, 0 outside the vocabulary, 40 end a document" in shown
    assert "the last 40 tokens held out, from a document's start on" in shown
    assert facts["train_text"].startswith("aaaaaaaaa")
    assert [each["tokens"] for each in facts["files"]] == [400]
    write_llmc(tmp_path / "a.bin", [15496, 995, 50256] * 10)
    _, facts = inspected(capsys, str(tmp_path / "a.bin"))
    assert (facts["tokenizer"], facts["train_text"][:11]) == ("gpt2", "Hello world")


def test_inspect_counts_ids_outside_the_vocabulary(tmp_path, capsys):
    path = write_datatrove(tmp_path / "a.ds", [[1, 2, 300, 70_000, 5]] * 10, "some tokenizer", 4)
    shown, facts = inspected(capsys, str(path))
    assert "'some tokenizer'; give it with --tokenizer" in shown
    assert (facts["smallest_id"], facts["largest_id"], facts["ids_outside_vocabulary"]) == (1, 70_000, None)
    capsys.readouterr()
    with pytest.raises(InputError, match=r"a\.ds has 20 ids outside the vocabulary of 257"):
        command.main(["inspect", str(path), "--tokenizer", "byte"])
    assert "20 outside the vocabulary" in capsys.readouterr().out


def test_inspect_says_what_a_text_is(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"content": "some words"}\n' * 30)
    shown, facts = inspected(capsys, str(tmp_path / "a.jsonl"))
    assert "1 × JSON Lines, field 'content'" in shown
    assert (facts["documents"], facts["text_bytes"], facts["text"]) == (30, 300, "some words")
    (tmp_path / "b.txt").write_text("plain")
    shown, facts = inspected(capsys, str(tmp_path))
    assert facts["forms"] == {"JSON Lines, field 'content'": 1, "plain text": 1}
    assert facts["documents"] == 31
