"""The presets are those that were promised, README.md states them truly, and files and flags combine as described."""

import json
from pathlib import Path
from typing import Any

import pytest

from scalegpt.architecture.counting import count_parameters, weight_bytes
from scalegpt.config import RunConfig
from scalegpt.config.presets import as_file, bundled, load_config_file, load_preset, preset_names, public_names, resolve
from scalegpt.errors import InputError
from scalegpt.planner.memory.states import training_bytes
from scalegpt.units import format_bytes

# layers, width, heads, block, micro batch (None: free), parameters, backend, stage
PROMISED: dict[str, tuple[int, int, int, int, int | None, int, str, int]] = {
    "tiny": (4, 192, 3, 256, None, 11_478_720, "fsdp", 2),
    "small": (12, 384, 6, 256, None, 40_658_304, "fsdp", 2),
    "150M": (16, 768, 12, 256, None, 152_101_632, "fsdp", 2),
    "200M": (16, 896, 14, 256, None, 199_472_000, "fsdp", 2),
    "250M": (16, 1024, 16, 256, None, 253_133_824, "fsdp", 2),
    "150M_1024": (16, 768, 12, 1024, 24, 152_691_456, "fsdp", 2),
    "200M_1024": (16, 896, 14, 1024, 20, 200_160_128, "fsdp", 2),
    "250M_1024": (16, 1024, 16, 1024, 16, 253_920_256, "deepspeed", 1),
    "350M_1024": (24, 1024, 16, 1024, 12, 354_599_936, "deepspeed", 2),
    "500M_1024": (24, 1280, 20, 1024, 8, 537_621_760, "deepspeed", 2),
}
LARGE = [name for name in PROMISED if name not in {"tiny", "small"}]

# layers, width, heads, heads of keys and values, parameters
MODERN: dict[str, tuple[int, int, int, int, int]] = {
    "150M_2048": (18, 768, 12, 4, 151_910_400),
    "350M_2048": (26, 1024, 16, 4, 344_645_888),
    "500M_2048": (24, 1280, 20, 4, 489_128_192),
}


def test_all_presets_exist() -> None:
    assert set(preset_names()) == {*PROMISED, *MODERN, "demo", "shakespeare_char"}
    assert not set(preset_names()) & set(public_names())


@pytest.mark.parametrize("name", MODERN)
def test_modern_presets_have_the_documented_shape(name: str) -> None:
    layers, width, heads, kv_heads, parameters = MODERN[name]
    run = resolve(preset=name)
    model = run.model
    assert (model.n_layer, model.n_embd, model.n_head, model.kv_heads) == (layers, width, heads, kv_heads)
    assert (model.norm, model.position, model.activation, model.qk_norm) == ("rmsnorm", "rope", "swiglu", True)
    assert (model.block_size, model.vocab_size, model.bias, model.tie_head) == (2048, 50304, False, True)
    assert count_parameters(model).total == parameters == pytest.approx(1e6 * int(name.split("M")[0]), rel=0.05)
    assert (run.parallel.backend, run.parallel.stage) == ("fsdp", 2)


@pytest.mark.parametrize("name", PROMISED)
def test_presets_have_the_documented_shape(name: str) -> None:
    layers, width, heads, block, batch, parameters, backend, stage = PROMISED[name]
    run = resolve(preset=name)
    model = run.model
    assert (model.n_layer, model.n_embd, model.n_head, model.block_size) == (layers, width, heads, block)
    assert (model.vocab_size, model.bias, model.tie_head, model.dropout) == (50304, False, True, 0.0)
    assert count_parameters(model).total == parameters
    assert batch in {None, run.train.micro_batch}
    assert (run.parallel.backend, run.parallel.stage) == (backend, stage)
    assert run.parallel.ds_config == (f"zero{stage}.json" if backend == "deepspeed" else None)


@pytest.mark.parametrize("name", [*PROMISED, *MODERN])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_ranks_divide_the_tokens_of_a_step(name: str, ranks: int) -> None:
    run = resolve(preset=name)
    assert run.train.tokens_per_step is not None
    assert run.train.tokens_per_step % (ranks * run.train.micro_batch * run.model.block_size) == 0


@pytest.mark.parametrize("name", [*LARGE, *MODERN])
def test_large_presets_end_at_twenty_tokens_a_parameter(name: str) -> None:
    run = resolve(preset=name)
    train = run.train
    assert train.max_iters is None
    assert train.max_tokens is not None
    assert train.tokens_per_step is not None
    assert train.max_tokens == pytest.approx(20 * count_parameters(run.model).total, rel=0.01)
    assert train.max_tokens % train.tokens_per_step == 0
    assert 0.02 < train.warmup_steps / (train.max_tokens / train.tokens_per_step) < 0.04


def test_rate_falls_as_the_model_grows() -> None:
    rates = [resolve(preset=name).train.learning_rate for name in sorted(LARGE, key=lambda name: PROMISED[name][5])]
    assert rates == sorted(rates, reverse=True)


GPT2_KEYS = {
    "n_layer", "n_embd", "n_head", "block_size", "vocab_size", "bias", "tie_head", "dropout", "activation",
}  # fmt: skip
"""What makes a model of GPT-2's shape; the other settings of a model are not used by these presets."""

MODERN_KEYS = GPT2_KEYS | {"n_kv_head", "n_inner", "norm", "norm_eps", "position", "rope_theta", "qk_norm"}


@pytest.mark.parametrize("name", preset_names())
def test_preset_files_spell_out_the_model_and_the_layout(name: str) -> None:
    values = load_preset(name)
    assert set(values["model"]) == (MODERN_KEYS if name in MODERN else GPT2_KEYS)
    assert {"description", "train", "backend", "zero_stage"} <= set(values)
    assert (values["backend"] == "deepspeed") == ("ds_config" in values)
    assert resolve(preset=name).train.schedule == "cosine"
    assert resolve(preset=name).train.min_lr_ratio == 0.1


def test_public_recipe_is_as_published() -> None:
    run = resolve(preset="shakespeare_char")
    model, train = run.model, run.train
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size, model.dropout) == (4, 4, 128, 64, 0.0)
    assert (train.micro_batch, train.tokens_per_step, train.max_iters, train.warmup_steps) == (12, 768, 2000, 100)
    assert (train.beta2, train.grad_clip, train.weight_decay, train.eval_every) == (0.99, 1.0, 0.1, 250)
    assert run.data.tokenizer == "char"


def readme_tables() -> list[list[list[str]]]:
    """The tables of configs/README.md: rows of cells, without headings."""
    tables: list[list[list[str]]] = [[]]
    for line in (bundled("configs") / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


def in_order_of_size() -> list[RunConfig]:
    return sorted(map(of, preset_names()), key=lambda run: count_parameters(run.model).total)


def of(name: str) -> RunConfig:
    return resolve(preset=name)


def test_readme_states_the_shapes_and_settings() -> None:
    words = {"plain": "plain", "fsdp": "fsdp stage {}", "deepspeed": "deepspeed stage {}"}
    expected = []
    for run in in_order_of_size():
        model, train = run.model, run.train
        tokens = train.tokens_per_step
        expected.append(
            [
                f"`{run.name}`", str(model.n_layer), str(model.n_embd), str(model.n_head), str(model.block_size),
                str(train.micro_batch), f"{count_parameters(model).total:,}",
                f"{tokens:,}" if tokens else f"{train.micro_batch * model.block_size:,} a GPU",
                words[run.parallel.backend].format(run.parallel.stage), f"{train.learning_rate:g}",
            ]
        )  # fmt: skip
    assert readme_tables()[0] == expected


def test_readme_states_the_memory() -> None:
    expected = []
    for run in in_order_of_size():
        parameters = count_parameters(run.model).total
        weights = weight_bytes(parameters)
        sizes = [weights["fp32"], weights["bf16"], sum(training_bytes(run.model).values())]
        expected.append([f"`{run.name}`", *map(format_bytes, sizes)])
    assert readme_tables()[2] == expected


def test_readme_states_what_a_longer_block_costs() -> None:
    def attention(run: RunConfig) -> float:
        model = run.model
        return 12 * model.n_layer * model.n_embd * model.block_size / (6 * count_parameters(model).total)

    expected = []
    for name in ("150M", "200M", "250M"):
        short, long = of(name), of(f"{name}_1024")
        more = count_parameters(long.model).total / count_parameters(short.model).total - 1
        row = [f"`{name}`, `{name}_1024`", f"{more:.2%}", f"{attention(short):.1%}", f"{attention(long):.1%}"]
        expected.append(row)
    assert readme_tables()[3] == expected
    assert len(readme_tables()) == 5


def test_readme_example_file_is_one(tmp_path: Path) -> None:
    text = (bundled("configs") / "README.md").read_text(encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(text.split("```yaml\n")[1].split("```")[0])
    run = resolve(config_file=str(path))
    assert (run.model.n_embd, run.train.learning_rate, run.parallel.stage) == (512, 8e-4, 2)


def write(folder: Path, values: Any, name: str = "mine.json") -> str:
    path = folder / name
    path.write_text(json.dumps(values))
    return str(path)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, {"model": {"n_layer": 7}, "train": {"learning_rate": 0.5, "micro_batch": 3}})
    run = resolve(config_file=path, flags={"learning_rate": "1e-3"})
    assert (run.model.n_layer, run.train.micro_batch, run.train.learning_rate) == (7, 3, 1e-3)
    assert run.train.beta2 == 0.95
    assert run.name == "mine"


def test_vocab_size_auto_is_the_tokenizer_s(tmp_path: Path) -> None:
    path = write(tmp_path, {"model": {"vocab_size": "auto"}})
    assert resolve(config_file=path).model.vocab_size == 0
    assert resolve(preset="tiny", flags={"vocab_size": "auto"}).model.vocab_size == 0
    assert resolve(preset="tiny").with_vocab(65).model.vocab_size == 65


def test_a_flag_overrides_the_layout_of_a_preset() -> None:
    run = resolve(preset="250M_1024", flags={"backend": "fsdp"})
    assert (run.parallel.stage, run.parallel.ds_config) == (3, None)
    run = resolve(preset="250M_1024", flags={"zero_stage": "3"})
    assert (run.parallel.backend, run.parallel.stage, run.parallel.ds_config) == ("deepspeed", 3, None)


@pytest.mark.parametrize("name", preset_names())
def test_a_run_written_as_a_file_is_read_back_unchanged(name: str, tmp_path: Path) -> None:
    run = resolve(preset=name, flags={"seed": "7"})
    assert resolve(config_file=write(tmp_path, as_file(run))) == run


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"n_hed": 3}}, "unknown key 'n_hed'; did you mean n_head"),
        ({"micro_batch": 3}, "micro_batch belongs under 'train'"),
        ({"block_size": 3}, "block_size belongs under 'model'"),
        ({"tokenizer": "byte"}, "tokenizer belongs under 'data'"),
        ({"train": [1]}, "train must be an object of settings"),
        ({"train": {"max_iters": None}}, "the schedule needs an end"),
        ({"backend": "fsdp", "ds_config": "zero1.json"}, "ds_config 'zero1.json' needs backend deepspeed"),
        ({"backend": "fdsp"}, "'fdsp' is not a value of backend; did you mean fsdp"),
    ],
)
def test_mistakes_in_a_file_are_refused(values: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, values)
    with pytest.raises(InputError) as refused:
        resolve(config_file=path)
    assert message in str(refused.value)
    assert path in str(refused.value)


def test_broken_json_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{\n"model": {},\n}')
    with pytest.raises(InputError, match=r"mine\.json:3: not JSON"):
        load_config_file(path)


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 350M_1024"):
        load_preset("350m_1024 ")
    with pytest.raises(InputError, match="did you mean SmolLM2-135M"):
        load_preset("smollm_135m")
    with pytest.raises(InputError, match="`scalegpt presets` lists"):
        load_preset("xyzzy")
    with pytest.raises(InputError, match="unknown setting 'learning_rat'; did you mean learning_rate"):
        resolve(flags={"learning_rat": 1})
    with pytest.raises(InputError, match="not both"):
        resolve(preset="tiny", config_file="mine.json")


# --- how long a run is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "flags", "lengths"),
    [
        (None, {}, (1000, None)),
        (None, {"max_tokens": "26e9"}, (None, 26 * 10**9)),
        (None, {"max_tokens": "none"}, (1000, None)),
        (None, {"max_iters": 50, "max_tokens": 4096}, (50, 4096)),
        (None, {"max_minutes": 5}, (1000, None)),
        ("tiny", {"max_tokens": 10**9}, (None, 10**9)),
        ("tiny", {"max_minutes": 5}, (2000, None)),
        ("150M", {"max_iters": 50}, (50, None)),
        ("150M", {"max_iters": "none"}, (None, 3_040_870_400)),
        ("150M", {"max_iters": 50, "max_tokens": 4096}, (50, 4096)),
    ],
)
def test_a_length_that_is_given_replaces_the_other_of_the_level_below(
    preset: str | None, flags: dict[str, Any], lengths: tuple[int | None, int | None]
) -> None:
    train = resolve(preset=preset, flags=flags).train
    assert (train.max_iters, train.max_tokens) == lengths


@pytest.mark.parametrize(
    ("values", "flags", "lengths"),
    [
        ({"max_tokens": 4096}, {}, (None, 4096)),
        ({"max_iters": 7}, {}, (7, None)),
        ({"max_iters": 1000, "max_tokens": 4096}, {}, (1000, 4096)),
        ({"max_iters": 1000, "max_tokens": 4096}, {"max_tokens": 8192}, (None, 8192)),
        ({"max_iters": 1000, "max_tokens": 4096}, {"max_iters": "none"}, (None, 4096)),
        ({"learning_rate": 1e-3}, {"max_tokens": 4096}, (None, 4096)),
    ],
)
def test_a_file_gives_a_length_as_flags_do(
    values: dict[str, Any], flags: dict[str, Any], lengths: tuple[int | None, int | None], tmp_path: Path
) -> None:
    train = resolve(config_file=write(tmp_path, {"train": values}), flags=flags).train
    assert (train.max_iters, train.max_tokens) == lengths


def test_a_written_configuration_keeps_its_length(tmp_path: Path) -> None:
    for flags in ({"max_tokens": 4096}, {"max_iters": 7}, {"max_iters": 7, "max_tokens": 4096}, {}):
        run = resolve(preset="tiny", flags=flags)
        assert resolve(config_file=write(tmp_path, as_file(run))).train == run.train
