"""What ScaleGPT writes is never text to train on, wherever it lies."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scalegpt.config import DataConfig
from scalegpt.data.prepare import prepare_again, prepare_cached
from scalegpt.data.text.corpus import survey
from scalegpt.data.text.ours import file_of_ours, folder_of_ours
from scalegpt.errors import InputError
from scalegpt.html import page

ROOT = Path(__file__).resolve().parents[2]
LOG = """\
warning: something
model    21,632 parameters: 1 layers, 32 wide, 2 heads, block 32, vocabulary 257
data     107,141 training and 11,905 held-out tokens, byte tokenizer; 0.72 epochs
"""
RUN = ("config.yaml", "plan.json", "metrics.jsonl", "run_status.json", "samples.txt")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder: a text, and beside it all that ScaleGPT may have left there."""
    (tmp_path / "text.txt").write_text("the text of the user\n" * 50)
    for run in ("runs/mine", "runs/copy", "old"):
        (tmp_path / run / "checkpoints" / "step_00000001").mkdir(parents=True)
        for name in RUN:
            (tmp_path / run / name).write_text("words of ours\n")
        (tmp_path / run / "checkpoints" / "step_00000001" / "checkpoint.json").write_text("words of ours\n")
    (tmp_path / "runs" / "mine" / ".run_id").write_text("1")
    alone = tmp_path / "a_checkpoint"
    alone.mkdir()
    (alone / "checkpoint.json").write_text("words of ours\n")
    (alone / "rank_00000.weights.safetensors").write_text("words of ours\n")
    (tmp_path / "train.log").write_text(LOG)
    (tmp_path / "report.html").write_text(page.document("a run", "<p>words of ours</p>"))
    return tmp_path


def test_only_the_users_text_is_read(folder: Path) -> None:
    corpus = survey([folder], "utf-8")
    assert [source.name for source in corpus.sources] == ["text.txt"]
    assert corpus.skipped.counts == {"folder of a run": 4, "log of ScaleGPT": 1, "page of ScaleGPT": 1}


def test_a_program_that_writes_pages_is_no_page(folder: Path) -> None:
    written = (folder / "report.html").read_text()
    (folder / "writer.py").write_text(f"PAGE = {written!r}\n")
    assert [source.name for source in survey([folder], "utf-8").sources] == ["text.txt", "writer.py"]


@pytest.mark.parametrize("inside", ["runs/mine", "old", "a_checkpoint", "old/checkpoints/.."])
def test_a_run_is_not_an_input(folder: Path, inside: str) -> None:
    with pytest.raises(InputError, match="is the folder of a run, which holds no text to train on"):
        survey([folder / inside], "utf-8")


def test_what_a_user_names_is_taken(folder: Path) -> None:
    assert [source.name for source in survey([folder / "train.log"], "utf-8").sources] == ["train.log"]
    assert survey([folder / "old" / "samples.txt"], "utf-8").sources


def test_folders_and_files_of_others_are_not_ours(tmp_path: Path) -> None:
    assert folder_of_ours({"config.yaml", "README.md", "metrics.jsonl"}) is None
    assert folder_of_ours({"checkpoint.json", "index.js"}) is None
    (tmp_path / "a.txt").write_text("model    with parameters: 3 layers\ndata")
    with (tmp_path / "a.txt").open("rb") as file:
        assert file_of_ours(file, named=False) is None
        assert file.tell() == 0


def test_the_log_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the text of the user\n" * 50)
    code = (
        "import sys\nfrom scalegpt.data.text.corpus import survey\n"
        "print('a first line', flush=True)\n"
        "corpus = survey(['.'], 'utf-8')\n"
        "assert [source.name for source in corpus.sources] == ['text.txt'], corpus.sources\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (tmp_path / "out.txt").open("w") as out, (tmp_path / "err.txt").open("w") as err:
        err.write("a warning of torch\n")
        err.flush()
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=out, stderr=err, env=environment)
    assert done.returncode == 0, (tmp_path / "err.txt").read_text()


# --- tokens that a run keeps -----------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the text of the user\n" * 50)
    return DataConfig(input_file=str(tmp_path / "texts"), tokenizer="byte")


def test_a_folder_that_has_changed_gives_the_tokens_that_a_run_began_with(data: DataConfig) -> None:
    begun = prepare_cached(data)
    assert prepare_again(data, begun.digest)[1] is None
    log = Path(str(data.input_file)) / "notes.txt"
    log.write_text("a line more\n")
    kept, changed = prepare_again(data, begun.digest)
    assert (kept.path, kept.digest) == (begun.path, begun.digest)
    assert changed == f"{data.input_file} has changed since this run began"
    for each in Path(str(data.input_file)).iterdir():
        each.write_bytes(b"")
    kept, changed = prepare_again(data, begun.digest)
    assert kept.digest == begun.digest
    assert changed is not None
    assert "cannot be read as it was when this run began (folder " in changed


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_without_the_old_tokens_there_are_the_new_ones(data: DataConfig, damage: str) -> None:
    begun = prepare_cached(data)
    (Path(str(data.input_file)) / "notes.txt").write_text("a line more\n")
    train = begun.path / "train.bin"
    if damage == "gone":
        train.unlink()
    else:
        train.write_bytes(b"x" * train.stat().st_size)
    again, changed = prepare_again(data, begun.digest)
    assert again.digest != begun.digest
    assert changed is None


def test_a_file_that_the_user_names_is_read_as_it_is_now(data: DataConfig) -> None:
    file = Path(str(data.input_file)) / "a.txt"
    named = data.changed(input_file=str(file))
    begun = prepare_cached(named)
    file.write_text("another text\n" * 50)
    again, changed = prepare_again(named, begun.digest)
    assert again.digest != begun.digest
    assert changed is None


def test_a_file_that_is_named_beside_a_folder_is_read_as_it_is_now(data: DataConfig, tmp_path: Path) -> None:
    file = tmp_path / "named.txt"
    file.write_text("a text of its own\n" * 50)
    mixed = data.changed(input_file=f"{data.input_file},{file}")
    begun = prepare_cached(mixed)
    again, changed = prepare_again(mixed, begun.digest)
    assert (again.digest, changed) == (begun.digest, None)
    file.write_text("another text\n" * 50)
    again, changed = prepare_again(mixed, begun.digest)
    assert again.digest != begun.digest
    assert changed is None


def test_prepared_tokens_beside_a_folder_are_refused_though_the_cache_has_the_runs_tokens(
    data: DataConfig, tmp_path: Path
) -> None:
    begun = prepare_cached(data)
    begun.path.rename(tmp_path / "prepared")
    begun = prepare_cached(data)
    with pytest.raises(InputError, match=r"holds tokens already prepared; give it alone .*a weight"):
        prepare_again(data.changed(input_file=f"{data.input_file},{tmp_path / 'prepared'}"), begun.digest)


def test_several_folders_may_change(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.txt").write_text("more text\n" * 50)
    both = data.changed(input_file=f"{data.input_file},{tmp_path / 'more'}")
    begun = prepare_cached(both)
    (tmp_path / "more" / "notes.txt").write_text("a line more\n")
    kept, changed = prepare_again(both, begun.digest)
    assert kept.digest == begun.digest
    assert changed is not None
