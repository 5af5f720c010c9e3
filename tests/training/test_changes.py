"""What a resumed run may have otherwise, and how that is told."""

import re
from typing import Any

import pytest

from scalegpt.config.presets import as_file, resolve
from scalegpt.config.run import SECTIONS
from scalegpt.training.runs.changes import (
    FREE_TO_CHANGE,
    allow_change,
    differences,
    free_differences,
    reshaping,
    ways_out,
)


def filed(**flags: Any) -> dict[str, Any]:
    return as_file(resolve(flags=flags, name="run"))


def test_what_is_free_to_change_are_settings() -> None:
    settings = {key for section in SECTIONS.values() for key in section.settings()}
    assert settings | {"name", "preset"} >= FREE_TO_CHANGE


@pytest.mark.parametrize(
    "key", ["n_layer", "vocab_size", "dropout", "learning_rate", "schedule", "seed", "precision", "tokens_per_step",
            "tokenizer", "val_fraction", "weight_decay", "residual_dtype"],
)  # fmt: skip
def test_what_decides_the_result_is_not_free(key: str) -> None:
    assert key not in FREE_TO_CHANGE


@pytest.mark.parametrize(
    ("before", "after", "reshaped"),
    [
        ({}, {"n_layer": 5, "dropout": 0.1}, {"n_layer"}),
        ({}, {"block_size": 128, "learning_rate": 1.0}, {"block_size"}),
        ({}, {"activation": "gelu_tanh", "norm_eps": 1e-6}, set()),
        ({}, {"activation": "swiglu"}, {"activation"}),
        ({"activation": "swiglu"}, {"activation": "geglu", "n_inner": 512}, set()),  # 512 is the default for this width
        ({}, {"n_inner": 500}, {"n_inner"}),
        ({}, {"norm": "rmsnorm"}, set()),
        ({"bias": True}, {"bias": True, "norm": "rmsnorm"}, {"norm"}),
        ({}, {"bias": "qkv"}, {"bias"}),
        ({}, {"n_embd": 384, "n_head": 6}, {"n_embd"}),
        ({"n_head": 6, "n_kv_head": 3}, {"n_head": 12, "n_kv_head": 3}, {"n_head"}),  # narrower heads of keys
    ],
)
def test_what_gives_weights_other_shapes_cannot_change(
    before: dict[str, Any], after: dict[str, Any], reshaped: set[str]
) -> None:
    assert reshaping(filed(**before), filed(**after)) == reshaped


def test_a_vocabulary_that_is_not_known_yet_hides_no_other_change() -> None:
    assert reshaping(filed(vocab_size="auto"), filed(vocab_size="auto", n_layer=5)) == {"n_layer"}


def test_differences_leave_out_what_is_free() -> None:
    ours, theirs = filed(), filed(max_iters=5, backend="fsdp", micro_batch=1, checkpoint_every=1)
    assert differences(ours, theirs) == {}
    assert differences(ours, filed(n_layer=5)) == {"n_layer": "4 → 5"}


def test_a_run_from_before_a_setting_existed_has_its_default() -> None:
    ours, theirs = filed(), filed()
    del theirs["model"]["parallel_block"]
    assert differences(theirs, ours) == free_differences(theirs, ours) == {}
    assert differences(theirs, filed(parallel_block=True)) == {"parallel_block": "False → True"}


def test_what_is_free_is_told_too() -> None:
    old, new = filed(), filed(backend="fsdp", micro_batch=1, learning_rate=0.5)
    old["preset"] = "tiny"
    assert free_differences(old, new) == {
        "backend": "plain → fsdp",
        "micro_batch": f"{old['train']['micro_batch']} → 1",
    }


def test_a_length_moves_the_schedule_unless_that_is_constant() -> None:
    old = filed(max_iters=800)
    follows = "800 → 200 (the learning rate's schedule follows)"
    assert free_differences(old, filed(max_iters=200)) == {"max_iters": follows}
    constant = filed(max_iters=800, schedule="constant"), filed(max_iters=200, schedule="constant")
    assert free_differences(*constant) == {"max_iters": "800 → 200"}


def test_the_advice_keeps_what_was_allowed_already() -> None:
    assert ways_out(["seed", "beta1"], {"learning_rate"}) == (
        "--allow_change learning_rate,seed,beta1 resumes with them; or choose another --model_name, or --fresh to start "
        "a new run beside it"
    )
    assert ways_out(["seed"]).startswith("--allow_change seed resumes with it; or ")
    assert re.match(r"choose another", ways_out(["n_layer", "seed"], {"beta1"}, {"n_layer"}))
    assert allow_change(["data", "seed"], {"seed"}) == "--allow_change seed,data"
