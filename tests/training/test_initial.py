"""Runs that start from the weights of a Hugging Face folder or of another run, and runs that are imported."""

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import scalegpt
from ranks import run_ranks
from scalegpt.checkpoint.reader import Checkpoint, read_manifest
from scalegpt.cli.main import main
from scalegpt.config import ModelConfig
from scalegpt.interop.families import as_config
from scalegpt.weights.layouts import targets
from scalegpt.weights.table import HUGGING_FACE
from weights.foreign import MODELS, random_model, saved

SHAPE = ModelConfig(
    n_layer=2, n_embd=16, n_head=2, block_size=32, vocab_size=300, bias=True, activation="gelu_tanh", dropout=0.1
)
FLAGS = (
    "--max_iters", "2", "--micro_batch", "2", "--precision", "fp32", "--sample_tokens", "0", "--eval_tokens", "64",
    "--warmup_steps", "0", "--dropout", "0",
)  # fmt: skip
SMALL = ("--n_layer", "1", "--n_embd", "16", "--n_head", "2", "--block_size", "16")
WORKER = Path(__file__).with_name("initial_worker.py")


pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    """A folder to run in, with ``text.txt`` and a Hugging Face folder ``theirs``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("a small text, again and again\n" * 60)
    write_folder(tmp_path / "theirs")
    return tmp_path


def write_folder(folder: Path, model: ModelConfig = SHAPE) -> None:
    """A folder that transformers would read, with random weights."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(as_config(model)))
    wanted = targets(model, HUGGING_FACE["gpt2"])
    values = {target.name: torch.randn(target.shape, generator=generator) * 0.1 for target in wanted}
    save_file(values, folder / "model.safetensors")


@pytest.fixture
def train(call: Callable[..., str]) -> Callable[..., str]:
    """Train on the text; words override the flags."""

    def run(*words: Any, status: int = 0) -> str:
        return call("train", "--input_file", "text.txt", *FLAGS, *words, status=status)

    return run


START = ("--init_from", "theirs", "--tokenizer", "byte")


def weights(run: str, step: int) -> dict[str, torch.Tensor]:
    stored = Checkpoint.open(Path(f"runs/{run}/checkpoints/step_{step:08d}"))
    stored.verify()
    return dict(stored.weights())


def stored_in(folder: str) -> dict[str, torch.Tensor]:
    from scalegpt.interop.families import read_config
    from scalegpt.weights.origin import open_folder

    origin = open_folder(read_config(Path(folder)))
    return dict(origin.stored())


# --- init_from -----------------------------------------------------------------------------------------------------------


def test_a_run_starts_from_a_folder_and_takes_its_shape(train: Callable[..., str]) -> None:
    out = train(*START, "--model_name", "run", "--max_iters", "0")
    assert "weights  from theirs" in out
    assert "2 layers, 16 wide, 2 heads, block 32, vocabulary 300" in out
    expected = stored_in("theirs")
    assert all(torch.equal(value, expected[name]) for name, value in weights("run", 0).items())
    config = yaml.safe_load(Path("runs/run/config.yaml").read_text())
    assert config["train"]["init_from"] == "theirs"
    assert {key: config["model"][key] for key in ("n_layer", "activation", "bias", "dropout")} == {
        "n_layer": 2, "activation": "gelu_tanh", "bias": True, "dropout": 0.0,
    }  # fmt: skip
    assert read_manifest(Path("runs/run/checkpoints/step_00000000")).header.config["train"]["init_from"] == "theirs"


@pytest.mark.parametrize("again", [START, ()])
def test_a_resumed_run_does_not_read_the_folder_again(train: Callable[..., str], again: tuple[str, ...]) -> None:
    train(*START, "--model_name", "run")
    shutil.rmtree("theirs")
    out = train(*again, "--model_name", "run", "--max_iters", "4")
    assert "resumed  from runs/run/checkpoints/step_00000002, step 2 of 4" in out
    assert "init_from" not in out


def test_a_run_without_a_checkpoint_reads_the_folder_again(train: Callable[..., str]) -> None:
    train(*START, "--model_name", "run", "--max_iters", "0")
    shutil.rmtree("runs/run/checkpoints")
    Path("runs/run/run_status.json").unlink()
    assert "weights  from theirs" in train(*START, "--model_name", "run", "--max_iters", "0")
    shutil.rmtree("runs/run/checkpoints")
    Path("runs/run/run_status.json").unlink()
    shutil.rmtree("theirs")
    assert "init_from theirs does not exist" in train(*START, "--model_name", "run", "--max_iters", "0", status=2)


def test_a_run_starts_from_another_run_with_its_tokenizer(train: Callable[..., str]) -> None:
    train(*START, "--model_name", "one")
    out = train("--init_from", "runs/one", "--model_name", "two", "--max_iters", "0")
    assert "byte tokenizer" in out
    assert all(torch.equal(value, weights("one", 2)[name]) for name, value in weights("two", 0).items())
    train("--init_from", "runs/one/checkpoints/step_00000002", "--model_name", "three", "--max_iters", "0")
    assert all(torch.equal(value, weights("one", 2)[name]) for name, value in weights("three", 0).items())


def test_a_run_without_a_name_is_named_after_the_folder(train: Callable[..., str], here: Path) -> None:
    Path("theirs").rename("Their (old) Model-1.5")
    start = ("--init_from", "Their (old) Model-1.5", "--tokenizer", "byte")
    train(*start)
    assert "resumed  from runs/Their-old-Model-1.5/checkpoints/step_00000002" in train(*start, "--max_iters", "3")
    train("--init_from", "runs/Their-old-Model-1.5")
    train("--init_from", "runs/Their-old-Model-1.5/checkpoints/step_00000003", "--fresh")
    assert {path.name for path in Path("runs").iterdir()} == {
        "Their-old-Model-1.5", "from-Their-old-Model-1.5", "from-Their-old-Model-1.5-2"
    }  # fmt: skip
    train(*start, "--model_name", "custom")  # as an earlier release named it
    assert "resumed  from runs/custom/checkpoints/step_00000002" in train(*start, "--max_iters", "3")


def test_python_starts_from_a_folder_too(here: Path) -> None:
    folder = scalegpt.train(
        input_file="text.txt", init_from="theirs", tokenizer="byte", model_name="run", max_iters=0, sample_tokens=0,
        eval_tokens=64, precision="fp32",
    )  # fmt: skip
    assert folder == Path("runs/run")


def test_vocabulary_and_context_may_differ(train: Callable[..., str]) -> None:
    out = train(*START, "--model_name", "run", "--vocab_size", "320", "--block_size", "16", "--max_iters", "0")
    assert "block 16, vocabulary 320" in out
    found, expected = weights("run", 0), stored_in("theirs")
    assert torch.equal(found["wte.weight"][:300], expected["wte.weight"])
    assert torch.equal(found["wte.weight"][300:], expected["wte.weight"].mean(0).expand(20, -1))
    assert torch.equal(found["wpe.weight"], expected["wpe.weight"][:16])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--n_layer", "4"), "n_layer 4 contradicts init_from theirs, whose model has n_layer 2; omit it"),
        (("--bias", "false"), "bias False contradicts init_from theirs, whose model has bias True"),
        (("--n_inner", "65"), "n_inner 65 contradicts init_from theirs, whose model has n_inner 64"),
        (("--preset", "tiny"), "the preset, with n_layer 4, contradicts init_from theirs"),
        (("--block_size", "33"), "has learned 32 positions; give --block_size 32 or less"),
        (("--vocab_size", "200"), "outside the vocabulary of 200"),
        (
            ("--init_from", "nowhere"),
            "init_from nowhere does not exist; give a Hugging Face folder",
        ),
        (("--init_from", "text.txt"), "text.txt is neither a run nor a checkpoint"),
    ],
)
def test_what_contradicts_the_folder_is_refused(
    train: Callable[..., str], words: tuple[str, ...], expected: str
) -> None:
    assert expected in train(*START, "--model_name", "run", *words, status=2)
    assert not Path("runs/run/config.yaml").exists()


def test_a_size_that_is_the_same_is_not_refused(train: Callable[..., str]) -> None:
    train(*START, "--model_name", "run", "--n_inner", "64", "--n_head", "2", "--n_layer", "2", "--max_iters", "0")


def test_a_damaged_folder_leaves_nothing(train: Callable[..., str]) -> None:
    path = Path("theirs/model.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    assert "is damaged or cut short" in train(*START, "--model_name", "run", status=2)
    assert not Path("runs/run").exists()


def test_tokens_of_another_tokenizer_than_the_runs_are_refused(
    train: Callable[..., str], call: Callable[..., str]
) -> None:
    train("--tokenizer", "char", "--model_name", "one", *SMALL)
    text = Path("text.txt").read_text()
    Path("text.txt").write_text(text.replace("m", "q"))  # as many characters, but not the same
    expected = "they were made by another tokenizer (char, not char)"
    assert expected in train("--init_from", "runs/one", "--model_name", "two", status=2)
    assert "weights  from runs/one" in train(
        "--init_from", "runs/one", "--model_name", "two", "--tokenizer", "byte", "--vocab_size", "257"
    )


def test_a_run_of_another_start_is_not_resumed(train: Callable[..., str]) -> None:
    train("--tokenizer", "byte", "--model_name", "run", *SMALL, "--tokens_per_step", "64")
    assert "init_from: None → theirs" in train(*START, "--model_name", "run", status=2)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, "plain") for name in MODELS),
        *product(("gpt2", "gpt_neox", "llama, head size 16, llama3"), ("fsdp", "deepspeed")),
    ],
)
@pytest.mark.slow
def test_the_first_loss_is_that_of_transformers(name: str, layout: str, here: Path) -> None:
    if layout == "deepspeed":
        pytest.importorskip("deepspeed")
    folder = saved(random_model(name, vocab_size=300), here / "model")
    ranks = 1 if layout == "plain" else 2
    settings = {
        "init_from": str(folder), "input_file": "text.txt", "tokenizer": "byte", "precision": "fp32", "backend": layout,
        "micro_batch": 4 // ranks, "block_size": 32,
    }  # fmt: skip
    found = run_ranks(WORKER, ranks, settings, here)
    assert found["transformers"] == pytest.approx(found["scalegpt"], rel=1e-4)
    assert found["ranks"] == ranks


def test_a_plan_has_the_shape_of_the_folder(call: Callable[..., str], train: Callable[..., str]) -> None:
    facts = json.loads(call("plan", "--init_from", "theirs", "--gpu", "rtx4090", "--json"))
    assert facts["model"]["parameters"] == sum(value.numel() for value in stored_in("theirs").values())
    assert "--init_from theirs" in facts["choice"]["command"]
    train(*START, "--model_name", "run", "--max_iters", "0")
    assert "give --config_file runs/run/config.yaml" in call(
        "plan", "--init_from", "runs/run", "--gpu", "rtx4090", status=2
    )


# --- import --------------------------------------------------------------------------------------------------------------


def test_an_imported_run_is_sampled_evaluated_trained_and_exported(
    call: Callable[..., str], train: Callable[..., str]
) -> None:
    call("import", "theirs", "--model_name", "run", "--tokenizer", "byte")
    assert {path.name for path in Path("runs/run").iterdir()} >= {"config.yaml", "run_status.json", "checkpoints"}
    expected = stored_in("theirs")
    assert all(torch.equal(value, expected[name]) for name, value in weights("run", 0).items())
    assert call("sample", "runs/run", "--prompt", "a", "--max_new_tokens", "3", "--temperature", "0")
    loss = json.loads(call("eval", "runs/run", "--input_file", "text.txt", "--json"))["loss"]
    assert 5 < loss < 7
    assert "whole" in call("checkpoint", "list", "runs/run")
    call("export", "runs/run", "--to", "safetensors", "--out", "run.safetensors")
    out = train("--model_name", "run", "--learning_rate", "0.002", "--block_size", "32", "--seed", "7")
    assert "resumed  from runs/run/checkpoints/step_00000000, step 0 of 2" in out
    assert "changed" not in out
    out = train("--model_name", "run", "--max_iters", "4", "--learning_rate", "0.003", status=2)
    assert "learning_rate: 0.002 → 0.003" in out
    assert "step 2 of 4" in train("--model_name", "run", "--learning_rate", "0.002", "--max_iters", "4", "--seed", "7")


def test_training_an_imported_run_equals_training_from_the_folder(
    call: Callable[..., str], train: Callable[..., str]
) -> None:
    call("import", "theirs", "--model_name", "imported", "--tokenizer", "byte")
    train("--model_name", "imported")
    train(*START, "--model_name", "direct")
    assert all(torch.equal(value, weights("direct", 2)[name]) for name, value in weights("imported", 2).items())


def test_an_imported_run_says_where_it_comes_from(call: Callable[..., str]) -> None:
    facts = json.loads(
        call("import", "theirs", "--model_name", "run", "--tokenizer", "byte", "--vocab_size", "320", "--json")
    )
    assert facts == {"run": "runs/run", "imported_from": "theirs"}
    manifest = read_manifest(Path("runs/run/checkpoints/step_00000000"))
    assert manifest.header.written_by["imported_from"] == "theirs"
    assert manifest.header.config["model"]["vocab_size"] == 320
    assert json.loads(Path("runs/run/run_status.json").read_text())["state"] == "imported"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("theirs", "--model_name", "run"), "tokenizer theirs is a folder without a tokenizer.json"),
        (
            ("theirs", "--model_name", "run", "--tokenizer", "gpt2"),
            "has 300 rows, but the gpt2 tokenizer has 50,257 ids",
        ),
        (("theirs", "--model_name", "a/b", "--tokenizer", "byte"), "must be a plain folder name"),
        (
            ("nowhere", "--model_name", "run"),
            "init_from nowhere does not exist; give a Hugging Face folder",
        ),
        (("theirs",), "--model_name"),
        (("theirs", "--model_name", "run", "--tokenizer", "byte", "--block_size", "33"), "learned 32 positions"),
        (("theirs", "--model_name", "run", "--n_layer", "3"), "unknown flag --n_layer"),
    ],
)
def test_an_import_that_cannot_work_leaves_nothing(
    call: Callable[..., str], words: tuple[str, ...], expected: str
) -> None:
    assert expected in call("import", *words, status=2)
    assert not Path("runs").exists()


def test_the_help_of_import_says_what_it_takes_from_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["import", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("[FOLDER's]") == 3
    assert "length T (1 to 100,000,000) [FOLDER's, at most 8192]" in said


def test_an_import_that_fails_on_the_way_leaves_nothing(call: Callable[..., str]) -> None:
    values = {target.name: torch.zeros(target.shape) for target in targets(SHAPE, HUGGING_FACE["gpt2"])}
    values["lm_head.weight"] = torch.ones(300, 16)  # a tied head that differs is found when it is read
    save_file(values, "theirs/model.safetensors")
    assert "lm_head.weight differs" in call("import", "theirs", "--model_name", "run", "--tokenizer", "byte", status=2)
    assert {path.name for path in Path("runs/run").iterdir()} <= {".lock"}
    write_folder(Path("good"))
    call("import", "good", "--model_name", "run", "--tokenizer", "byte")


def test_an_imported_run_is_not_replaced(call: Callable[..., str]) -> None:
    call("import", "theirs", "--model_name", "run", "--tokenizer", "byte")
    assert "runs/run exists already" in call("import", "theirs", "--model_name", "run", "--tokenizer", "byte", status=2)


# --- a folder as it is ---------------------------------------------------------------------------------------------------


def test_a_folder_of_ours_is_loaded_as_the_run_was(train: Callable[..., str], call: Callable[..., str]) -> None:
    train(*START, "--model_name", "run")
    call("export", "runs/run", "--to", "hf", "--out", "exported")
    run, folder = scalegpt.load("run", device="cpu"), scalegpt.load("exported", device="cpu")
    assert folder.generate("a small", max_new_tokens=20, temperature=0) == run.generate(
        "a small", max_new_tokens=20, temperature=0
    )
    assert folder.tokenizer.digest == run.tokenizer.digest or folder.tokenizer.vocab_size == run.tokenizer.vocab_size
    assert "omit --checkpoint" in call("sample", "exported", "--checkpoint", "best", status=2)
    out = train("--init_from", "exported", "--model_name", "again", "--max_iters", "0")
    assert "weights  from exported" in out
