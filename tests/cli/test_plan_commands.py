"""The command that a plan prints: the trainer takes it, and it means the same run."""

import json
import random
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from interop.public_models import PUBLIC
from scalegpt.cli.main import main
from scalegpt.cli.parser import given_settings
from scalegpt.cli.train import make_parser
from scalegpt.config import DataConfig
from scalegpt.config.presets import named_settings, preset_names, public_names, resolve
from scalegpt.config.run import SECTIONS
from scalegpt.config.settings import field_types
from scalegpt.data.prepare import prepare
from scalegpt.data.tokenizer_training import train_tokenizer
from scalegpt.errors import InputError
from scalegpt.hardware.gpus import find_card
from scalegpt.hardware.machine import Machine
from scalegpt.planner.checks import with_expected_vocabulary
from scalegpt.planner.query import Answer, Asked, answer
from scalegpt.planner.start.command import DATA, PREPARED
from scalegpt.system.invocation import train_command
from scalegpt.training.setup.data import with_tokenizer_of_tokens

DRAWS = 300
WORDS = {
    "input_file": ["my text.txt", "it's/data", "a.txt", "~/x"],
    "encoding": ["auto", "latin-1"], "ds_config": ["zero2.json", "none"],
    "sample_prompt": ["Once upon a time", "$HOME `x` \"q\"", "none", "-5", "--a-b", ""],
    "tokenizer": ["gpt2", "byte", "char"],
    "n_embd": ["192", "384"], "n_head": ["3", "6"], "n_layer": ["2", "4", "1e1"],
    "vocab_size": ["auto", "257", "32000", "50304"],
    "block_size": ["64", "256"], "max_iters": ["10", "1_000", "none"], "tokens_per_step": ["8192", "4096", "none"],
    "micro_batch": ["1", "2", "auto"], "precision": ["auto", "bf16", "fp32"], "attention": ["auto"],
    "max_tokens": ["1e6", "none"],
}  # fmt: skip
"""Values of settings for which any number within the bounds would do nothing but be refused."""


def value_of(name: str, field: Any, draw: random.Random) -> str:
    """A value that the setting may have."""
    bounds = field.metadata
    if name in WORDS:
        return draw.choice(WORDS[name])
    if bounds["choices"]:
        return str(draw.choice(bounds["choices"]))
    kinds = field_types(field)
    if bool in kinds:
        return draw.choice(["true", "false", "on", "off"])
    if type(None) in kinds and draw.random() < 0.3:
        return "none"
    low = bounds["minimum"] if bounds["minimum"] is not None else 0
    high = next((bounds[key] for key in ("maximum", "below") if bounds[key] is not None), low + 1000)
    if int in kinds:
        return str(draw.randint(int(low), min(int(high), 10**6)))
    return repr(draw.uniform(low + 1e-3 * (high - low), 0.99 * high))


def drawn(seed: int) -> dict[str, str]:
    """Flags at random: a few settings of every section."""
    draw = random.Random(seed)
    fields = {name: field for section in SECTIONS.values() for name, field in section.settings().items()}
    names = draw.sample(sorted(fields), draw.randint(1, 8))
    return {name: value_of(name, fields[name], draw) for name in names}


def planned(
    preset: str | None, config_file: str | None, flags: dict[str, str], card: str, gpus: int, hf: str | None = None
) -> Answer:
    machine = Machine.with_card(find_card(card), gpus=gpus)
    asked = Asked.of(preset=preset, config_file=config_file, hf=hf, flags=flags, machine=machine)
    return answer(asked, explain=False)


def understood(words: str) -> Any:
    """The run that the trainer makes of a command."""
    launcher = next(kind for kind in ("torchrun", "deepspeed", "python") if words.split(" launch")[0].find(kind) >= 0)
    target = shlex.split(train_command(launcher))[-1]
    given = shlex.split(words)
    arguments = make_parser().parse(given[given.index(target) + 1 :])
    flags = given_settings(arguments, *SECTIONS.values())
    run = resolve(preset=arguments.preset, config_file=arguments.config_file, flags=flags)
    if arguments.preset is not None and run.data.tokenizer == resolve(preset=arguments.preset).data.tokenizer:
        return run
    stated = named_settings(config_file=arguments.config_file)
    return with_expected_vocabulary(run, {*flags, *stated})


def test_the_trainer_parses_every_printed_command_to_the_same_run(tmp_path: Path) -> None:
    file = tmp_path / "my run.json"
    file.write_text(
        json.dumps({"data": {"tokenizer": "byte"}, "model": {"n_layer": 3, "n_embd": 96}, "backend": "fsdp"})
    )
    accepted = 0
    for seed in range(DRAWS):
        draw, flags = random.Random(seed), drawn(seed)
        preset = draw.choice([None, "tiny", "demo", "shakespeare_char"])
        config_file = str(file) if preset is None and draw.random() < 0.5 else None
        try:
            given = planned(preset, config_file, flags, "4090", draw.choice([1, 1, 2, 8]))
        except InputError:
            continue
        accepted += 1
        ours, theirs = asdict(given.choice.run), asdict(understood(given.command()))
        for run in (ours, theirs):
            run["parallel"]["zero_stage"] = run["parallel"]["zero_stage"] or given.choice.run.parallel.stage
            if given.choice.run.data.input_file is None:
                run["data"]["input_file"] = None
            run["auto"] = None
        assert theirs == ours, (seed, flags)
    assert accepted > DRAWS / 3


@pytest.mark.parametrize("preset", [*preset_names(), *public_names()])
def test_a_preset_alone_is_trained_as_planned(preset: str) -> None:
    given = planned(preset, None, {}, "a100-80gb", 1)
    assert asdict(understood(given.command()).model) == asdict(given.choice.run.model)


@pytest.mark.parametrize("name", ["gpt2", "pythia-160m", "SmolLM2-360M", "Llama-3.2-1B"])
def test_a_hugging_face_model_is_trained_as_planned(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLIC[name].config), encoding="utf-8")
    given = planned(None, None, {"micro_batch": "1"}, "h100", 8, hf=str(tmp_path))
    trained = understood(given.command())
    assert trained.model == given.choice.run.model
    assert trained.train.micro_batch == 1


@pytest.mark.parametrize(
    ("flags", "vocabulary", "data"),
    [
        ({"vocab_size": "32000"}, 32000, PREPARED), ({"vocab_size": "50304"}, 50304, DATA),
        ({"vocab_size": "auto"}, 50304, DATA),
        ({"tokenizer": "byte"}, 257, DATA), ({"tokenizer": "byte", "vocab_size": "50304"}, 50304, DATA),
        ({"tokenizer": "byte", "vocab_size": "200"}, 200, PREPARED), ({"tokenizer": "byte", "vocab_size": "auto"}, 257, DATA),
    ],
)  # fmt: skip
def test_the_vocabulary_is_the_trainers(flags: dict[str, str], vocabulary: int, data: str) -> None:
    given = planned("tiny", None, flags, "4090", 1)
    assert given.choice.run.model.vocab_size == vocabulary == understood(given.command()).model.vocab_size
    assert f"--input_file {data}" in given.command()
    said = [note for note in given.notes if "the trainer refuses text" in note]
    assert len(said) == (data == PREPARED)


@pytest.mark.parametrize("form", ["byte", "char", "file"])
def test_prepared_tokens_have_the_vocabulary_that_the_trainer_takes(tmp_path: Path, form: str) -> None:
    """Not the preset's: its tokenizer is GPT-2's, and its vocabulary 50,304."""
    text, out = tmp_path / "text.txt", str(tmp_path / "tokens")
    text.write_text("To be, or not to be, that is the question.\n" * 200)
    tokenizer = form
    if form == "file":
        tokenizer = str(tmp_path / "tokenizer")
        train_tokenizer([text], Path(tokenizer), 270, DataConfig())
    tokens = prepare([text], out, DataConfig(tokenizer=tokenizer))
    data = with_tokenizer_of_tokens(DataConfig(input_file=out), frozenset())
    for source in (out, f"{out}=1,{text}=2"):
        given = planned("tiny", None, {"input_file": source}, "4090", 1)
        assert given.choice.run.data.tokenizer == data.tokenizer
        assert given.choice.run.model.vocab_size == tokens.tokenizer.padded_vocab_size
        assert understood(given.command()).data == given.choice.run.data
    kept = planned("tiny", None, {"input_file": out, "vocab_size": "512"}, "4090", 1)
    assert kept.choice.run.model.vocab_size == 512
    named = planned("tiny", None, {"input_file": out, "tokenizer": "gpt2"}, "4090", 1)  # the trainer refuses this
    assert named.choice.run.model.vocab_size == 50304


def test_a_folder_that_does_not_say_its_tokenizer_is_planned_as_text(tmp_path: Path) -> None:
    for content in ("{", "[]", '{"tokenizer": {"kind": "hf", "vocab_size": 300}}', '{"tokenizer": {"kind": "byte"}}'):
        (tmp_path / "meta.json").write_text(content)
        assert planned("tiny", None, {"input_file": str(tmp_path)}, "4090", 1).choice.run.model.vocab_size == 50304


def test_the_planner_s_tokenizer_sizes_are_right() -> None:
    from scalegpt.config.tokenizer import TOKENS
    from scalegpt.data.tokenizers import make_tokenizer

    assert {kind: make_tokenizer(kind).vocab_size for kind in TOKENS} == TOKENS
    assert make_tokenizer("byte").padded_vocab_size == TOKENS["byte"]


@pytest.mark.parametrize("launcher", ["python", "torchrun", "deepspeed"])
def test_the_command_is_one_line_that_this_installation_runs(launcher: str) -> None:
    flags = {"deepspeed": {"backend": "deepspeed"}, "torchrun": {"backend": "fsdp"}, "python": {}}[launcher]
    gpus = 1 if launcher == "python" else 8
    command = planned("tiny", None, {**flags, "input_file": "my data/it's.txt"}, "4090", gpus).command()
    options = {"python": [], "torchrun": ["--nproc_per_node", "8"], "deepspeed": ["--num_gpus", "8"]}[launcher]
    assert command.startswith(train_command(launcher, *options) + " --preset tiny ")
    assert "\n" not in command
    assert "my data/it's.txt" in shlex.split(command)


def test_a_bare_plan_shows_every_preset_on_what_is_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path))
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")
    assert main(["plan", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in found["presets"]} == set(preset_names())
    assert found["gpu"]["name"].startswith("cpu")
    assert any("no GPU was found" in note for note in found["notes"])
    assert main(["plan", "--gpus", "8"]) == 2
    assert "give --gpu NAME, --memory_gb N, or --preset NAME" in capsys.readouterr().err


def test_how_a_gpu_name_was_read_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--preset", "tiny", "--backend", "fsdp", "--gpu"]
    assert main([*words, "2x h100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gpu"]["name"], found["gpu"]["count"]) == ("H100 SXM", 2)
    assert found["notes"][0] == "gpu '2x h100' was read as --gpu 'h100' --gpus 2"
    assert found["notes"][1].startswith("gpu 'h100' was taken as H100 SXM")
    assert main([*words, "2x h100", "--gpus", "3"]) == 2
    assert "says 2 gpus, but --gpus says 3" in capsys.readouterr().err
    assert main(["plan", "--gpu", "2x h100"]) == 0
    assert "was read as --gpu 'h100' --gpus 2" in capsys.readouterr().out
