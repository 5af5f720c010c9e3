"""``~`` behind ``--flag=``, which a shell leaves alone, means the home folder; ``./~`` is a file of that name."""

from pathlib import Path

import pytest

from scalegpt.cli.main import main

SHAPE = [
    "--n_layer=1",
    "--n_embd=16",
    "--n_head=2",
    "--block_size=8",
    "--precision=fp32",
    "--compile=off",
    "--tokenizer=byte",
]
LENGTH = [
    "--micro_batch=2",
    "--tokens_per_step=16",
    "--max_iters=1",
    "--warmup_steps=0",
    "--eval_tokens=16",
    "--sample_tokens=0",
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    (folder / "text.txt").write_text("A text at home. " * 50)
    (folder / "mine.yaml").write_text("data: {input_file: ~/text.txt}\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def test_every_path_flag_expands_the_home_folder(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SHAPE, *LENGTH, "--model_name=a", "--runs_dir=~/runs", "--config-file=~/mine.yaml"]) == 0
    assert (home / "runs/a/config.yaml").is_file()
    for words in (
        ["data", "prepare", "~/text.txt", "--out=~/tokens", "--tokenizer", "byte"],
        ["data", "inspect", "~/tokens"],
        ["data", "ledger", "~/runs/a", "--steps", "1"],
        ["checkpoint", "list", "~/runs/a"],
        ["checkpoint", "convert", "~/runs/a", "--out=~/a.safetensors"],
        ["sample", "~/runs/a", "--max_new_tokens=1", "--prompt_file=~/text.txt"],
        ["params", "--config_file=~/mine.yaml"],
        ["plan", "--gpu", "4090", "--preset", "tiny", "--html=~/page.html", "--input_file=~/text.txt"],
    ):
        assert main(words) == 0, capsys.readouterr().err
    made = {path.name for path in home.iterdir()}
    assert made >= {"tokens", "a.safetensors", "page.html"}
    assert not list(Path().iterdir())


def test_a_file_named_tilde(home: Path) -> None:
    Path("~").write_text("Not at home. " * 50)
    assert main(["data", "prepare", "./~", "--out=./~tokens", "--tokenizer", "byte"]) == 0
    assert Path("~tokens").is_dir()
    assert "tokens" not in {path.name for path in home.iterdir()}


def test_an_unknown_user_s_home_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "prepare", "~nobody_here/x", "--out", "tokens"]) == 2
    assert "there is no user 'nobody_here'" in capsys.readouterr().err
    assert main(["plan", "--preset", "tiny", "--input_file=~nobody_here/x"]) == 2
    assert "input_file '~nobody_here/x': there is no user" in capsys.readouterr().err
