"""DeepSpeed's configuration: complete, in keeping with the run, and with nothing left at sizes made for giants."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans import block_parameters
from scalegpt.architecture.decoder import parameter_shapes
from scalegpt.config import RunConfig
from scalegpt.config.presets import bundled, preset_names, resolve
from scalegpt.errors import InputError
from scalegpt.planner.memory.deepspeed.keys import ALLOWED, REFUSED
from scalegpt.planner.memory.deepspeed.settings import deepspeed_settings, load_ds_config

LAYOUTS = [*((stage, "none") for stage in range(4)), (1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")]

SIZES = {
    "reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size", "stage3_max_live_parameters",
    "stage3_param_persistence_threshold",
}  # fmt: skip
"""The sizes that DeepSpeed sets to hundreds of millions by default."""


def run(**flags: Any) -> RunConfig:
    return resolve(flags={"backend": "deepspeed", "precision": "bf16", "micro_batch": 3, **flags})


def settings(given: RunConfig, *, grad_accum: int = 2, ranks: int = 4, on_cuda: bool = True) -> dict[str, Any]:
    return deepspeed_settings(given, grad_accum=grad_accum, ranks=ranks, on_cuda=on_cuda)


def values(tree: Any) -> list[Any]:
    return [leaf for value in tree.values() for leaf in values(value)] if isinstance(tree, dict) else [tree]


@pytest.fixture
def own_file(tmp_path: Path) -> Any:
    """A factory of DeepSpeed files of a user's."""

    def make(content: Any) -> str:
        path = tmp_path / "mine.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return make


# --- ours ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "offload"), LAYOUTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_auto_is_filled(stage: int, offload: str, precision: str) -> None:
    filled = settings(run(zero_stage=stage, offload=offload, precision=precision))
    assert "auto" not in values(filled)
    assert filled["zero_optimization"]["stage"] == stage
    assert filled["train_batch_size"] == 3 * 2 * 4
    assert filled["train_micro_batch_size_per_gpu"] * filled["gradient_accumulation_steps"] * 4 == 24
    assert filled["fp16"]["enabled"] == (precision == "fp16")
    assert filled["bf16"]["enabled"] == (precision == "bf16" and stage > 0)
    assert filled["communication_data_type"] == "fp32"
    fp32_gradients = not (precision == "fp16" and stage == 0)
    assert filled["data_types"]["grad_accum_dtype"] == ("fp32" if fp32_gradients else "fp16")
    zero = filled["zero_optimization"]
    assert ("offload_optimizer" in zero) == (offload != "none")
    assert ("offload_param" in zero) == (offload == "all")
    json.dumps(filled)


GATED = {"activation": "swiglu", "norm": "rmsnorm", "n_inner": 1000, "bias": "true"}  # the widest bias has 2000 numbers


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "shape", [{}, {"n_embd": 768, "n_head": 12, "bias": "true"}, {"n_embd": 257, "n_head": 1, "bias": "true"}, GATED]
)
def test_sizes_follow_the_model(stage: int, shape: dict[str, Any]) -> None:
    given = run(zero_stage=stage, **shape)
    zero = settings(given)["zero_optimization"]
    block = block_parameters(given.model)
    assert zero["reduce_bucket_size"] == block
    if stage == 3:
        assert SIZES - {"allgather_bucket_size"} <= zero.keys()
        assert zero["stage3_prefetch_bucket_size"] == block
        embedding = given.model.vocab_size * given.model.n_embd
        assert zero["stage3_max_live_parameters"] == 2 * block + embedding
        assert zero["stage3_max_reuse_distance"] == 0
        vectors = max(shape[0] for shape in parameter_shapes(given.model).values() if len(shape) == 1)
        assert zero["stage3_param_persistence_threshold"] == max(4 * given.model.n_embd, vectors)
    else:
        assert zero["allgather_bucket_size"] == block + block % 2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "file", [{}, {"zero_optimization": {}}, {"zero_optimization": None, "bf16": None, "fp16": None}]
)
def test_what_a_file_leaves_out_is_not_left_to_deepspeed(stage: int, file: Any, own_file: Any) -> None:
    """A user's file that says nothing gets what ours get."""
    ours = settings(run(zero_stage=stage))
    theirs = settings(run(zero_stage=stage, ds_config=own_file(file)))
    printing = {"steps_per_print", "wall_clock_breakdown"}
    assert {key: value for key, value in ours.items() if key not in printing} == theirs


@given(st.integers(1, 40), st.integers(1, 6), st.booleans())
def test_a_block_is_counted_as_the_calculator_does(width: int, heads: int, bias: bool) -> None:
    model = run(n_embd=width * heads, n_head=heads, bias=bias, n_layer=2).model
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(model).items()}
    assert block_parameters(model) == sum(size for name, size in sizes.items() if name.startswith("blocks.1."))


def test_overlap_and_pinned_memory_are_for_cuda() -> None:
    given = run(zero_stage=3, offload="all")
    for on_cuda, ranks, overlap in ((True, 4, True), (True, 1, False), (False, 4, False)):
        zero = settings(given, on_cuda=on_cuda, ranks=ranks)["zero_optimization"]
        assert zero["overlap_comm"] is overlap
        assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu", "pin_memory": on_cuda}


def test_clipping_is_ours_where_deepspeed_hides_the_norm() -> None:
    assert settings(run(zero_stage=0, grad_clip=0.5))["gradient_clipping"] == 0.0
    assert settings(run(zero_stage=0, grad_clip=0.5, precision="fp16"))["gradient_clipping"] == 0.5
    assert settings(run(zero_stage=2, grad_clip=0.5))["gradient_clipping"] == 0.5


@pytest.mark.parametrize("name", preset_names())
def test_presets_and_their_files_agree(name: str) -> None:
    given = resolve(preset=name)
    if given.parallel.backend == "deepspeed":
        assert given.parallel.ds_config == f"zero{given.parallel.stage}.json"
        assert load_ds_config(given.parallel)["zero_optimization"]["stage"] == given.parallel.stage
        settings(resolve(preset=name, flags={"precision": "bf16"}))
    else:
        assert given.parallel.ds_config is None


def test_there_is_a_file_for_each_stage_and_it_is_for_that_stage() -> None:
    found = {
        path.name: json.loads(path.read_text())["zero_optimization"]["stage"]
        for path in bundled("ds_configs").glob("*")
    }
    assert found == {f"zero{stage}.json": stage for stage in range(4)}


# --- a user's --------------------------------------------------------------------------------------------------------


def test_a_users_values_are_kept(own_file: Any) -> None:
    path = own_file({
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 12_345, "overlap_comm": False},
        "fp16": {"initial_scale_power": 8},
        "comms_logger": {"enabled": True},
    })  # fmt: skip
    filled = settings(run(zero_stage=2, ds_config=path))
    assert filled["zero_optimization"]["reduce_bucket_size"] == 12_345
    assert filled["zero_optimization"]["overlap_comm"] is False
    assert filled["fp16"]["initial_scale_power"] == 8
    assert filled["comms_logger"] == {"enabled": True}


def test_a_file_of_that_name_here_comes_before_ours(
    own_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(own_file({"wall_clock_breakdown": True})).rename(tmp_path / "zero1.json")
    assert settings(run(zero_stage=1, ds_config="zero1.json"))["wall_clock_breakdown"] is False
    monkeypatch.chdir(tmp_path)
    assert settings(run(zero_stage=1, ds_config="zero1.json"))["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ({"train_micro_batch_size_per_gpu": 5}, ("train_micro_batch_size_per_gpu at 5", "--micro_batch sets it to 3")),
        ({"gradient_accumulation_steps": 5}, ("gradient_accumulation_steps at 5", "--tokens_per_step sets it to 2")),
        ({"train_batch_size": 5}, ("train_batch_size at 5", "sets it to 24")),
        ({"gradient_clipping": 0.25}, ("gradient_clipping at 0.25", "--grad_clip sets it to 1.0")),
        ({"bf16": {"enabled": False}}, ("enabled at False", "--precision sets it to True")),
        ({"fp16": {"enabled": True}}, ("enabled at True", "--precision sets it to False")),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            ("device at 'cpu'", "--offload sets it to none"),
        ),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, ("device at 'nvme'", "--offload")),
    ],
)
def test_contradictions_are_refused_with_a_way_out(file: Any, words: tuple[str, ...], own_file: Any) -> None:
    with pytest.raises(InputError) as caught:
        settings(run(zero_stage=2, ds_config=own_file(file)))
    for fragment in (*words, 'write "auto" there'):
        assert fragment in str(caught.value)


def test_an_offload_of_the_file_and_the_flag_together_are_fine(own_file: Any) -> None:
    file = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}}
    zero = settings(run(zero_stage=2, offload="optimizer", ds_config=own_file(file)))["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    file = {"zero_optimization": {"offload_optimizer": {"device": "none"}, "offload_param": None}}
    settings(run(zero_stage=2, ds_config=own_file(file)))


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("{", ":1: not JSON"),
        ("[]", "must hold an object"),
        ({"zero_optimization": True}, "zero_optimization must be an object"),
        ({"bf16": True}, "bf16 must be an object"),
        ({"fp16": "auto"}, "fp16 must be an object"),
        ({"data_types": 1}, "data_types must be an object"),
        ({"zero_optimization": {"stage": 3}}, "is for ZeRO stage 3, but the run is for 2; use --zero_stage 3"),
        ('{"fp16": {}, "fp16": {}}', "the key 'fp16' appears twice; remove one"),
        ("[" * 100_000, "objects and lists nest deeper than 32"),
        ('{"a": NaN}', "a is unknown"),
        (b"\\xff\\xfe".decode("ascii"), ": not JSON"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is not accepted: the run's own flags set it; remove it"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is not accepted: the run's own flags set it; remove it"),
        ({"memory_breakdown": "auto"}, '"auto" is not supported for memory_breakdown; set a value'),
        ({"reduce_bucket_size": 1}, "reduce_bucket_size is unknown; remove it"),
        ({"wall_clock_breakdwon": True}, "wall_clock_breakdwon is unknown; did you mean wall_clock_breakdown?"),
        (
            {"zero_optimization": {"overlap_com": True}},
            "zero_optimization.overlap_com is unknown; did you mean overlap_comm",
        ),
        ({"\x1b[31m": 1}, "\\x1b[31m is unknown"),
    ],
)
def test_a_file_that_will_not_do_is_refused(file: Any, words: str, own_file: Any) -> None:
    with pytest.raises(InputError) as caught:
        settings(run(zero_stage=2, ds_config=own_file(file)))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_names_ours(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"zero22.json: No such file or directory; did you mean zero2.json"):
        settings(run(zero_stage=2, ds_config="zero22.json"))
    with pytest.raises(InputError, match="Is a directory"):
        settings(run(zero_stage=2, ds_config=str(tmp_path)))


def test_an_auto_stage_is_the_runs(own_file: Any) -> None:
    filled = settings(run(zero_stage=3, ds_config=own_file({"zero_optimization": {"stage": "auto"}})))
    assert filled["zero_optimization"]["stage"] == 3


# --- what is taken ---------------------------------------------------------------------------------------------------

FILES = {
    "csv_monitor": {"enabled": True, "output_path": "/tmp/x", "job_name": "j"},
    "tensorboard": {"enabled": True},
    "wandb": {"enabled": True, "project": "p"},
    "comet": {"enabled": True},
    "flops_profiler": {"enabled": True, "output_file": "/tmp/x"},
    "autotuning": {"enabled": True, "results_dir": "/tmp/x"},
    "nebula": {"enabled": True, "persistent_storage_path": "/tmp/x"},
    "checkpoint": {"use_node_local_storage": True},
    "data_efficiency": {"enabled": True, "data_sampling": {"enabled": True}},
}


@pytest.mark.parametrize("key", FILES)
def test_what_writes_elsewhere_is_refused_by_name_unless_it_is_off(key: str, own_file: Any) -> None:
    with pytest.raises(InputError, match=f": {key} is not accepted: .*; remove it"):
        settings(run(zero_stage=2, ds_config=own_file({key: FILES[key]})))
    for off in (None, False, {}, {**FILES[key], "enabled": False}):
        assert key not in settings(run(zero_stage=2, ds_config=own_file({key: off})))


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ({"torch_autocast": {"enabled": True}}, "torch_autocast is not accepted: use --precision"),
        ({"amp": {"enabled": True}}, "use --precision"),
        ({"activation_checkpointing": {"partition_activations": True}}, "use --recompute"),
        ({"compile": {"enabled": True}}, "use --compile"),
        ({"prescale_gradients": True}, "prescale_gradients must be false, not true"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor must be 1, not 2.0"),
        ({"sparse_gradients": True}, "must be false"),
        ({"data_types": {"param_dtype": "bf16"}}, "data_types.param_dtype is not accepted"),
        ({"data_types": {"grad_accum_dtype": "fp8"}}, "must be 'fp32' or 'bf16' or 'fp16', not 'fp8'"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights_and_grads must be false"),
        ({"fp16": {"loss_scale": 128}}, "fp16.loss_scale must be 0, not 128"),
        ({"zero_optimization": {"contiguous_gradients": False}}, "zero_optimization.contiguous_gradients must be true"),
        ({"zero_optimization": {"reduce_scatter": False}}, "must be true, not false"),
        ({"zero_optimization": {"zero_hpz_partition_size": 0}}, "must be a whole number of at least 1, not 0"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "must be false"),
        ({"zero_optimization": {"cpu_offload": True}}, "cpu_offload is not accepted: use --offload"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zenflow is not accepted: the plan does not model"),
        ({"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}, "offload_optimizer.ratio must be 1"),
        ({"zero_optimization": {"offload_optimizer": {"nvme_path": "/x"}}}, "nvme_path must be null, not '/x'"),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, "must be a whole number of at least 1, not 0"),
        ({"zero_optimization": {"reduce_bucket_size": "5e8"}}, "must be a whole number of at least 1, not '5e8'"),
        ({"zero_optimization": {"reduce_bucket_size": True}}, "not true"),
        ({"zero_optimization": {"reduce_bucket_size": 1e300}}, "must be a whole number"),
        ('{"zero_optimization": {"reduce_bucket_size": NaN}}', "must be a whole number"),
        ({"zero_optimization": {"allgather_bucket_size": 3}}, "a whole number of at least 2, a multiple of 2, not 3"),
        ({"zero_optimization": {"sub_group_size": [1] * 1000}}, "must be a whole number"),
        ({"train_batch_size": "24"}, "train_batch_size must be a whole number"),
    ],
)  # fmt: skip
def test_what_the_plan_does_not_count_is_refused_by_name(file: Any, words: str, own_file: Any) -> None:
    with pytest.raises(InputError) as caught:
        settings(run(zero_stage=2, ds_config=own_file(file)))
    assert words in str(caught.value)
    assert len(str(caught.value).replace(own_file("{}"), "")) < 200


def test_numbers_may_be_written_as_deepspeeds_examples_do(own_file: Any) -> None:
    path = own_file('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8, "allgather_bucket_size": 2e8}}')
    zero = settings(run(zero_stage=2, ds_config=path))["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (500_000_000, 200_000_000)
    assert all(isinstance(zero[key], int) for key in ("reduce_bucket_size", "allgather_bucket_size"))


def test_every_key_that_deepspeed_knows_is_taken_or_refused_by_name() -> None:
    """By the classes of the installed DeepSpeed, so that a new version's keys are noticed."""
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    offload = pytest.importorskip("deepspeed.runtime.zero.offload_config")
    precision = pytest.importorskip("deepspeed.runtime.precision_config")
    zero = ALLOWED["zero_optimization"]
    classes = [
        (config.DeepSpeedZeroConfig, zero),
        (offload.DeepSpeedZeroOffloadParamConfig, zero["offload_param"]),
        (offload.DeepSpeedZeroOffloadOptimizerConfig, zero["offload_optimizer"]),
        (precision.DeepSpeedBF16Config, ALLOWED["bf16"]),
        (precision.DeepSpeedFP16Config, ALLOWED["fp16"]),
    ]
    for kind, allowed in classes:
        names = {field.alias or name for name, field in kind.model_fields.items()}
        assert names <= {*allowed, *REFUSED}, names - {*allowed, *REFUSED}
