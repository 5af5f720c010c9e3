"""``--hf``: a Hugging Face model is planned and counted as a preset of the same shape is."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import scalegpt
from interop.public_models import PUBLIC
from scalegpt.cli.main import main
from scalegpt.cli.parser import given_settings
from scalegpt.cli.train import make_parser
from scalegpt.config.presets import resolve
from scalegpt.errors import InputError
from scalegpt.training.initial import with_initial
from tokenizer_samples import content

Printed = pytest.CaptureFixture[str]


def model(path: Path, name: str, **changes: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(PUBLIC[name].config | changes), encoding="utf-8")
    return path


def printed(capsys: Printed, *words: str) -> Any:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["gpt2", "pythia-160m", "SmolLM2-360M", "Llama-3-8B"])
def test_a_model_is_planned_as_a_preset_of_its_shape(name: str, tmp_path: Path, capsys: Printed) -> None:
    plan = ("plan", "--gpu", "h100", "--gpus", "8", "--block_size", "1024", "--dropout", "0")
    layout = ("--backend", "fsdp", "--zero_stage", "2")
    settings = (*layout, "--tokens_per_step", "65536", "--max_tokens", "1e9", "--micro_batch", "2")
    found = printed(capsys, *plan, *settings, "--hf", str(model(tmp_path / name, name)))
    preset = printed(capsys, *plan, *settings, "--preset", name)
    assert found["model"]["name"] == name
    assert found["model"]["parameters"] == preset["model"]["parameters"]
    assert found["choice"]["phases"] == preset["choice"]["phases"]
    assert found["choice"]["tokens_per_second"] == preset["choice"]["tokens_per_second"]


def test_a_folder_and_its_file_are_the_same(tmp_path: Path, capsys: Printed) -> None:
    folder = model(tmp_path / "small-gpt2", "gpt2")
    file = printed(capsys, "params", "--hf", str(folder / "config.json"))
    assert file == printed(capsys, "params", "--hf", str(folder))
    assert (file["name"], file["parameters"]) == ("small-gpt2", 124_439_808)
    changed = printed(capsys, "params", "--hf", str(folder), "--n_layer", "6")
    assert (changed["name"], changed["model"]["n_layer"]) == ("small-gpt2 (changed)", 6)


def test_a_long_context_is_planned_with_a_shorter_block_and_says_so(tmp_path: Path) -> None:
    folder = model(tmp_path / "llama", "Llama-3.2-1B")
    answer = scalegpt.plan(hf=folder, gpu="h100", gpus=8)
    assert answer.choice.run.model.block_size == 8192
    assert any("planned for blocks of 8,192 tokens, out of the 131,072" in note for note in answer.notes)
    assert "--block_size 8192" in answer.command()
    answer = scalegpt.plan(hf=folder, gpu="h100", gpus=8, block_size=16384)
    assert answer.choice.run.model.block_size == 16384
    assert not any("planned for blocks" in note for note in answer.notes)


def test_a_window_is_the_longest_block(tmp_path: Path, capsys: Printed) -> None:
    changes = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    folder = model(tmp_path / "mistral", "Llama-3.2-1B", **changes)
    answer = scalegpt.plan(hf=folder, gpu="h100", gpus=8)
    assert answer.choice.run.model.block_size == 4096
    assert any("looks back 4,096 tokens" in note for note in answer.notes)
    assert main(["plan", "--hf", str(folder), "--gpu", "h100", "--block_size", "8192"]) == 2
    assert "give --block_size 4096 or less" in capsys.readouterr().err


def test_what_cannot_be_expressed_is_one_line(tmp_path: Path, capsys: Printed) -> None:
    folder = model(tmp_path / "moe", "SmolLM2-135M", model_type="qwen3_moe")
    for command in ("plan", "params"):
        assert main([command, "--hf", str(folder)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert f"{folder}/config.json: model_type 'qwen3_moe' is not supported: it is a mixture of experts" in err


def test_one_source_at_a_time(tmp_path: Path, capsys: Printed) -> None:
    assert main(["plan", "--hf", str(model(tmp_path / "a", "gpt2")), "--preset", "tiny"]) == 2
    assert "not both" in capsys.readouterr().err


def test_every_card_is_planned(tmp_path: Path, capsys: Printed) -> None:
    found = printed(capsys, "plan", "--hf", str(model(tmp_path / "gpt2", "gpt2")))
    assert found["model"]["parameters"] == 124_439_808
    assert len(found["gpus"]) > 20


def test_neither_torch_nor_transformers_is_loaded(tmp_path: Path) -> None:
    folder = model(tmp_path / "gpt2", "gpt2")
    program = (
        "import sys; from scalegpt.cli.main import main; "
        f"main(['plan', '--hf', {str(folder)!r}, '--gpu', 'h100']); "
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == "[]"


def test_the_folder_s_tokenizer_and_vocabulary_are_the_trainer_s(tmp_path: Path) -> None:
    folder = model(tmp_path / "padded", "gpt2", vocab_size=1000)
    (folder / "tokenizer.json").write_text(content("gpt2_like"), encoding="utf-8")
    answer = scalegpt.plan(hf=folder, gpu="h100")
    assert answer.choice.run.data.tokenizer == str(folder)
    assert answer.choice.run.model.vocab_size == 1000
    assert f"--tokenizer {folder}" in answer.command()
    assert "--vocab_size 1000" in answer.command()
    model(folder, "gpt2", vocab_size=100)
    with pytest.raises(InputError, match="more than vocab_size 100"):
        scalegpt.plan(hf=folder, gpu="h100")


def test_a_command_that_trains_with_another_tokenizer_than_the_models_says_so(tmp_path: Path) -> None:
    def notes(**source: Any) -> list[str]:
        answer = scalegpt.plan(source.pop("preset", None), gpu="h100", **source)
        return [each for each in answer.notes if "GPT-2's tokenizer" in each]

    folder = model(tmp_path / "smol", "SmolLM2-360M")
    expected = "the command trains with GPT-2's tokenizer, not with that of {}; --tokenizer FOLDER names it"
    assert notes(preset="SmolLM2-360M") == [expected.format("SmolLM2-360M")]
    assert notes(hf=folder) == [expected.format("smol")]
    assert notes(preset="gpt2") == notes(preset="150M_1024") == notes(preset="Qwen3-0.6B", tokenizer="byte") == []
    assert notes(hf=model(tmp_path / "small-gpt2", "gpt2")) == []
    (folder / "tokenizer.json").write_text(content("gpt2_like"))
    assert notes(hf=folder) == []


def test_the_command_starts_from_the_weights_that_are_there(tmp_path: Path) -> None:
    folder = model(tmp_path / "llama", "Llama-3.2-1B")
    (folder / "tokenizer.json").write_text(content("llama3_like"), encoding="utf-8")
    assert "--init_from" not in scalegpt.plan(hf=folder, gpu="h100", gpus=8).command()
    (folder / "model.safetensors").touch()
    given = scalegpt.plan(hf=folder, gpu="h100", gpus=8)
    words = shlex.split(given.command())
    arguments = make_parser().parse(words[words.index("--init_from") :])
    assert not {"n_layer", "norm", "vocab_size", "tokenizer"} & set(vars(arguments))
    flags, _ = with_initial(given_settings(arguments), preset=None, config_file=None, folder=None)
    trained = resolve(flags=flags)
    assert trained.model == given.choice.run.model
    assert trained.data.tokenizer == given.choice.run.data.tokenizer == str(folder)
    changed = scalegpt.plan(hf=folder, gpu="h100", gpus=8, n_layer=8)
    assert "--init_from" not in changed.command()
    assert "--n_layer 8" in changed.command()
