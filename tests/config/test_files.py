"""Configuration files as users write them, and files that are none."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from scalegpt.config import ModelConfig, TrainConfig
from scalegpt.config.machine import MachineConfig
from scalegpt.config.presets import as_file, from_run, load_config_file, resolve
from scalegpt.config.run import SECTIONS
from scalegpt.config.sampling import SamplingSettings
from scalegpt.config.settings import Section, field_types, limits
from scalegpt.errors import InputError
from scalegpt.structured import parse_yaml


def write(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_yaml_words_take_the_setting_s_type(tmp_path: Path) -> None:
    text = (
        "name: 2024\npreset: 007\n"
        "model: {bias: ON, tie_head: no, dropout: 1e-1}\n"
        "train:\n  on_spike: off\n  learning_rate: 1e-3\n  max_iters: 1_000\n  warmup_steps: 010\n  max_minutes: ~\n"
        "  sample_prompt: 2024-01-01\n  compile: no\n"
    )
    with pytest.raises(InputError, match="'no' is not a value of compile"):
        resolve(config_file=write(tmp_path, text))
    run = resolve(config_file=write(tmp_path, text.replace("compile: no", "compile: off")))
    assert (run.name, run.preset) == ("2024", "007")
    assert (run.model.bias, run.model.tie_head, run.model.dropout) == (True, False, 0.1)
    train = run.train
    assert (train.on_spike, train.learning_rate, train.max_iters, train.warmup_steps) == ("off", 1e-3, 1000, 10)
    assert (train.max_minutes, train.sample_prompt, train.compile) == (None, "2024-01-01", "off")


def test_yaml_numbers_in_base_sixty_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_minutes must be a number or none, not '1:30'"):
        resolve(config_file=write(tmp_path, "train: {max_minutes: 1:30}"))


def test_json_may_have_a_byte_order_mark_and_numbers_for_names(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeff" + json.dumps({"name": 2024, "train": {"on_spike": False}}), "mine.json")
    assert (resolve(config_file=path).name, resolve(config_file=path).train.on_spike) == ("2024", "off")


@pytest.mark.parametrize("home", ["~", "~/text.txt"])
def test_tilde_is_the_home_folder_in_every_path(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    meant = home.replace("~", "/home/me")
    if home != "~":  # which alone is YAML's null
        path = write(tmp_path, f"data: {{input_file: {home}}}\nbackend: deepspeed\nds_config: {home}\n")
        run = resolve(config_file=path)
        assert (run.data.input_file, run.parallel.ds_config) == (meant, meant)
    assert resolve(flags={"input_file": home}).data.input_file == meant
    assert resolve(flags={"input_file": "./~"}).data.input_file == "./~"


SECRETS = {
    "a key": "-----BEGIN OPENSSH PRIVATE KEY-----\nc2VjcmV0\n-----END\n",
    "passwords": "root:$6$c2VjcmV0:19000:0:99999:7:::\ndaemon:*:19000\n",
    "variables": "TOKEN=c2VjcmV0\n",
    "pairs": "c2VjcmV0: x\npassword: c2VjcmV0\n",
    "a section": "[default]\nkey = c2VjcmV0\n",
    "broken": "c2VjcmV0: [c2VjcmV0\n: c2VjcmV0 *c2VjcmV0",
    "JSON": '{"c2VjcmV0": "c2VjcmV0"}',
}


@pytest.mark.parametrize("text", SECRETS.values(), ids=SECRETS)
@pytest.mark.parametrize("name", ["mine.yaml", "mine.json", "mine"])
def test_a_file_that_is_not_a_configuration_is_not_quoted(text: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        load_config_file(write(tmp_path, text, name))
    assert "c2VjcmV0" not in str(refused.value)
    assert name in str(refused.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": ["a"]}, "preset must be a word, not a list"),
        ({"name": {"a": 1}}, "name must be a word, not an object"),
        ({"name": True}, "name must be a word, not True"),
        ({"description": "x" * 5000}, "description has more than 1,000 characters"),
        ({"model": {"n_layer": ["x"] * 1000}}, "n_layer must be a whole number, not a list"),
        ({"model": {"n_layer": 10**39}}, "n_layer must be at most 2,000, not 1000000000000000000000000000000000000000"),
        ({"train": {"sample_prompt": "x" * 200_000}}, "sample_prompt has more than 100,000 characters"),
        ({"train": {"sample_prompt": "\ud800"}}, "sample_prompt '\\ud800' is not UTF-8"),
        ({"data": {"input_file": "a\0b"}}, "input_file 'a\\x00b' is not a valid path"),
    ],
)
def test_impossible_values_are_one_line(values: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        resolve(config_file=write(tmp_path, json.dumps(values), "mine.json"))
    assert message in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "value", ["1e308", "1e309", "9" * 4400, "-" + "9" * 4400, "9223372036854775807", "9" * 100_000]
)
@pytest.mark.parametrize("key", ["n_embd", "tokens_per_step", "step_timeout", "max_iters"])
def test_numbers_beyond_any_use_are_one_line(key: str, value: str) -> None:
    with pytest.raises(InputError, match=f"{key} must be ") as refused:
        resolve(flags={key: value})
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("section", [*SECTIONS.values(), MachineConfig, SamplingSettings])
def test_every_number_has_an_upper_bound(section: type[Section]) -> None:
    for name, field in section.settings().items():
        if {int, float} & set(field_types(field)):
            assert field.metadata["maximum"] is not None or field.metadata["below"] is not None, name
            assert limits(field)


def test_large_plausible_values_are_accepted() -> None:
    assert ModelConfig(n_layer=1000, n_embd=131_072, n_head=1024, block_size=10_000_000, vocab_size=1_000_000)
    train = TrainConfig(tokens_per_step=10**9, max_iters=10**9, max_tokens=10**16, step_timeout=30 * 24 * 3600)
    assert train.max_tokens == 10**16


@pytest.mark.parametrize("prompt", ["1e5", "off", "2024", "null-ish", "~/x", "a: b", "0123", "'x'", "a\nb\x1b"])
def test_a_run_s_configuration_is_read_back_unchanged(prompt: str, tmp_path: Path) -> None:
    run = resolve(preset="tiny", flags={"sample_prompt": prompt, "input_file": "text.txt"}, name="1e3")
    text = yaml.safe_dump(as_file(run), sort_keys=False, allow_unicode=True)
    assert resolve(config_file=write(tmp_path, text)) == run
    assert from_run(parse_yaml(text, "x"), "x") == as_file(run)
