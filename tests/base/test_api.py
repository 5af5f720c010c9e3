"""``import scalegpt``: the commands' functions from Python, light to import."""

import doctest
import json
import subprocess
import sys
from pathlib import Path

import pytest

import scalegpt
from scalegpt import api
from scalegpt.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "tokenizer": "byte", "vocab_size": 257, "n_layer": 1, "n_embd": 8, "n_head": 1, "block_size": 16, "micro_batch": 2,
    "tokens_per_step": 32, "warmup_steps": 0, "precision": "fp32", "device": "cpu", "sample_tokens": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text("a text to learn from, line by line\n" * 100, encoding="utf-8")


def losses(run: Path) -> dict[int, float]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize(
    "program",
    [
        "import scalegpt",
        "from scalegpt import plan, train, load, InputError, RunError",
        "import scalegpt; scalegpt.plan('tiny', gpu='rtx4090')",
    ],
)
def test_importing_and_planning_load_neither_torch_nor_numpy(program: str) -> None:
    program += "; import sys; print(sorted({'torch', 'numpy', 'deepspeed', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_it_loads_no_part_that_is_not_used() -> None:
    program = "import sys, scalegpt; print(sorted(name for name in sys.modules if name.startswith('scalegpt.')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "['scalegpt.errors']"


def test_what_is_public_is_there_and_documented() -> None:
    for name in ("plan", "train", "load"):
        function = getattr(scalegpt, name)
        assert name in dir(scalegpt)
        assert all(part in function.__doc__ for part in ("Args:", "Returns:", "Raises:")), name
    with pytest.raises(AttributeError, match="no attribute 'plans'"):
        scalegpt.plans  # noqa: B018


@pytest.mark.parametrize("module", [scalegpt, api])
def test_the_examples_in_the_docstrings_hold(module: object) -> None:
    found = doctest.testmod(module)  # type: ignore[arg-type]
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("--preset 500M_1024 --gpu a100-40gb --gpus 8", {"preset": "500M_1024", "gpu": "a100-40gb", "gpus": 8}),
        ("--preset tiny --memory_gb 2 --micro_batch 4", {"preset": "tiny", "memory_gb": 2, "micro_batch": 4}),
        ("--preset 250M --gpu 2x3090 --margin 0.1", {"preset": "250M", "gpu": "2x3090", "margin": 0.1}),
        ("--n_layer 2 --gpu t4 --no_calibration", {"n_layer": 2, "gpu": "t4", "calibrated": False}),
    ],
)
def test_a_plan_is_that_of_the_command(
    words: str, asked: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *words.split(), "--json"]) == 0
    answer = scalegpt.plan(**asked)  # type: ignore[arg-type]
    assert json.loads(json.dumps(answer.as_dict())) == json.loads(capsys.readouterr().out)
    assert answer.choice.fits
    assert answer.choice.total_bytes == answer.as_dict()["choice"]["total_bytes"]


def test_a_plan_can_be_traced() -> None:
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 32, "vocab_size": 97, "tokens_per_step": 64}
    traced = scalegpt.plan(gpu="a100-40gb", backend="plain", micro_batch=2, trace=True, **shape).trace
    assert traced is not None
    assert max(traced.values()) > 0


def test_a_run_trains_resumes_and_is_loaded() -> None:
    run = scalegpt.train("tiny", input_file="text.txt", max_iters=2, **SMALL)
    assert run == Path("runs/tiny")
    first = losses(run)
    assert sorted(first) == [1, 2]
    assert scalegpt.train("tiny", input_file=Path("text.txt"), max_iters=4, **SMALL) == run
    after = losses(run)
    assert sorted(after) == [1, 2, 3, 4]
    assert first.items() <= after.items()

    model = scalegpt.load("tiny", device="cpu")
    assert model.header.progress.step == 4
    text = model.generate("a text", max_new_tokens=8, temperature=0.9, top_k=20, seed=5)
    assert text == scalegpt.load(run, device="cpu").generate(
        "a text", max_new_tokens=8, temperature=0.9, top_k=20, seed=5
    )
    assert text != model.generate("a text", max_new_tokens=8, temperature=0.9, top_k=20, seed=6)
    assert isinstance(model.generate(max_new_tokens=3), str)


def test_generating_gives_what_the_command_prints(tiny_run: object, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run()  # type: ignore[operator]
    words = ["--prompt", "ab", "--max_new_tokens", "12", "--temperature", "0.7", "--seed", "3", "--device", "cpu"]
    assert main(["sample", str(run), *words, "--json"]) == 0
    sample = json.loads(capsys.readouterr().out)["continuation"]
    assert scalegpt.load(run, device="cpu").generate("ab", max_new_tokens=12, temperature=0.7, seed=3) == sample


def test_mistakes_are_errors_of_the_package_and_say_where() -> None:
    with pytest.raises(scalegpt.InputError, match="did you mean tiny"):
        scalegpt.plan("tinyy", gpu="t4")
    with pytest.raises(scalegpt.InputError, match="needs a preset"):
        scalegpt.plan(gpu="t4")
    with pytest.raises(scalegpt.InputError, match=r"^plan\(\): gpus must be at least 1"):
        scalegpt.plan("tiny", gpu="t4", gpus=0)
    with pytest.raises(scalegpt.InputError, match=r"^train\(\): max_iters must be"):
        scalegpt.train("tiny", input_file="text.txt", max_iters=-1)
    with pytest.raises(scalegpt.InputError, match="micro_batch, and tokens_per_step"):
        scalegpt.train("tiny", input_file="text.txt", batch_size=3)
    with pytest.raises(scalegpt.InputError, match="does not exist"):
        scalegpt.load("no_such_run")
    assert not Path("runs").exists()


def test_a_prompt_or_a_setting_that_cannot_be_is_refused(tiny_run: object) -> None:
    model = scalegpt.load(tiny_run(), device="cpu")  # type: ignore[operator]
    with pytest.raises(scalegpt.InputError, match=r"^generate\(\): temperature must be at least 0"):
        model.generate("a", temperature=-1)


def test_a_run_that_a_signal_stopped_is_an_error_and_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    from scalegpt.training import trainer

    real = trainer.learning_rate

    def rate(train: object, step: int, total: int) -> float:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(train, step, total)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "learning_rate", rate)
    with pytest.raises(scalegpt.RunError, match="the run was stopped"):
        scalegpt.train("tiny", input_file="text.txt", max_iters=50, **SMALL)
    monkeypatch.setattr(trainer, "learning_rate", real)
    stopped = len(losses(Path("runs/tiny")))
    assert 0 < stopped < 50
    scalegpt.train("tiny", input_file="text.txt", max_iters=50, **SMALL)
    assert len(losses(Path("runs/tiny"))) == 50


@pytest.mark.parametrize("place", ["scalegpt.training.setup.prepare.make_backend", "scalegpt.training.run.Trainer"])
def test_a_failure_leaves_the_run_free_to_train_again(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise scalegpt.RunError("planted")

    with monkeypatch.context() as broken:
        broken.setattr(place, fail)
        with pytest.raises(scalegpt.RunError, match="planted") as kept:
            scalegpt.train("tiny", input_file="text.txt", max_iters=2, **SMALL)
    assert kept.value is not None  # the exception, and all that its frames hold, is alive while the next call trains
    scalegpt.train("tiny", input_file="text.txt", max_iters=2, **SMALL)
    assert len(losses(Path("runs/tiny"))) == 2


def test_several_changes_may_be_allowed_in_one_string() -> None:
    scalegpt.train("tiny", input_file="text.txt", max_iters=2, **SMALL)
    scalegpt.train(
        "tiny", input_file="text.txt", **{**SMALL, "max_iters": 3, "grad_clip": 0.5}, allow_change="grad_clip,schedule"
    )
    assert len(losses(Path("runs/tiny"))) == 3


def test_the_module_to_run_does_not_replace_the_function() -> None:
    program = (
        "import importlib, scalegpt\n"
        "try: importlib.import_module('scalegpt.train')\n"
        "except ImportError as error: print(error)\n"
        "assert callable(scalegpt.train)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("scalegpt.train is a function")
