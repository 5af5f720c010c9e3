"""The presets that are public models have the shapes of the models' own files, and their numbers of parameters."""

import json
from pathlib import Path

import pytest

from interop.public_models import PUBLIC
from scalegpt.architecture.counting import count_parameters
from scalegpt.config.presets import load_preset, public_names, resolve
from scalegpt.interop.families import as_config, read_config


def test_every_public_preset_has_its_file_here() -> None:
    assert set(public_names()) == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_shape_is_that_of_the_model_s_own_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLIC[name].config), encoding="utf-8")
    read = read_config(tmp_path)
    model = resolve(preset=name).model
    assert model.block_size <= read.positions
    assert read.notes == ()
    # Some models were pretrained with shorter blocks than their file states; a preset trains without dropout.
    assert as_config(model) == as_config(read.model.changed(block_size=model.block_size, dropout=0.0))


@pytest.mark.parametrize("name", PUBLIC)
def test_the_number_of_parameters_is_the_published_one(name: str) -> None:
    assert count_parameters(resolve(preset=name).model).total == PUBLIC[name].parameters


@pytest.mark.parametrize("name", PUBLIC)
def test_the_family_is_the_model_s(name: str) -> None:
    assert as_config(resolve(preset=name).model)["architectures"] == PUBLIC[name].config["architectures"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLIC)
def test_transformers_counts_as_many(name: str) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    values = dict(PUBLIC[name].config)
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLIC[name].parameters


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_ranks_divide_the_tokens_of_a_step(name: str, ranks: int) -> None:
    run = resolve(preset=name)
    assert run.train.tokens_per_step is not None
    assert run.train.tokens_per_step % (ranks * run.train.micro_batch * run.model.block_size) == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_a_run_ends_at_twenty_tokens_a_parameter(name: str) -> None:
    train = resolve(preset=name).train
    assert train.max_tokens is not None
    assert train.tokens_per_step is not None
    assert train.max_tokens == pytest.approx(20 * PUBLIC[name].parameters, rel=0.01)
    assert train.max_tokens % train.tokens_per_step == 0
    assert 0.02 < train.warmup_steps / (train.max_tokens / train.tokens_per_step) < 0.04


@pytest.mark.parametrize("name", PUBLIC)
def test_files_state_what_makes_the_model(name: str) -> None:
    model = load_preset(name)["model"]
    stated = {
        "n_layer",
        "n_embd",
        "n_head",
        "block_size",
        "vocab_size",
        "bias",
        "tie_head",
        "norm",
        "position",
        "activation",
    }
    assert stated <= set(model)
