"""Words of other trainers: each leads to a setting that exists, or to a sentence."""

import re

import pytest

from scalegpt.cli.plan.command import _parser
from scalegpt.cli.train import make_parser
from scalegpt.config.aliases import hint, words_of_others
from scalegpt.config.machine import MachineConfig
from scalegpt.config.run import SECTIONS

RENAMED, ANSWERS = words_of_others()
SETTINGS = sorted({name for section in SECTIONS.values() for name in section.settings()})
TRAIN = [flag for action in make_parser()._actions for flag in action.option_strings if flag.startswith("--")]
PLAN = [flag for action in _parser()._actions for flag in action.option_strings if flag.startswith("--")]
HUGGING_FACE = """learning_rate
per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps warmup_ratio
warmup_steps lr_scheduler_type weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm bf16 fp16 tf32 logging_steps
save_steps save_total_limit eval_steps evaluation_strategy output_dir overwrite_output_dir report_to run_name seed
dataloader_num_workers gradient_checkpointing torch_compile deepspeed fsdp optim resume_from_checkpoint hidden_size
num_hidden_layers num_attention_heads num_key_value_heads intermediate_size max_position_embeddings rope_theta
tie_word_embeddings max_seq_length packing attn_implementation"""
NANOGPT = """out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from wandb_log wandb_project
wandb_run_name dataset gradient_accumulation_steps batch_size block_size n_layer n_head n_embd dropout bias learning_rate
max_iters weight_decay beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr backend device dtype compile"""
MEGATRON = """micro_batch_size global_batch_size seq_length train_iters lr min_lr lr_decay_style lr_decay_iters clip_grad
num_layers hidden_size num_attention_heads ffn_hidden_size tensor_model_parallel_size pipeline_model_parallel_size
recompute_granularity lr_warmup_iters data_path save_interval vocab_size num_query_groups init_method_std"""
TORCHTITAN = """training.steps training.seq_len training.local_batch_size optimizer.lr lr_scheduler.warmup_steps
metrics.log_freq checkpoint.interval activation_checkpoint.mode model.flavor training.dataset job.dump_folder
parallelism.tensor_parallel_degree"""
ISSUE = """batch_size lr epochs dtype device_batch_size learning-rate-decay rope seq_len n_ctx wd weight-decay bf16 wandb
num_epochs hidden_dim seqlen batchsize nlayers gpus nodes vram"""


@pytest.mark.parametrize("setting", RENAMED)
def test_a_word_leads_to_a_flag_that_exists(setting: str) -> None:
    assert f"--{setting}" in {*TRAIN, *PLAN}
    assert {"gpu", "gpus", "nodes", "memory_gb", "network_gbps"} <= MachineConfig.settings().keys()


@pytest.mark.parametrize("sentence", ANSWERS)
def test_a_sentence_names_settings_that_exist(sentence: str) -> None:
    assert set(re.findall(r"\{(\w+)\}", sentence)) <= set(SETTINGS)


def test_no_word_leads_to_two_answers_or_is_itself_a_setting() -> None:
    every = [word for table in (RENAMED, ANSWERS) for words in table.values() for word in words]
    assert len(every) == len(set(every))
    assert not set(every) & {flag.removeprefix("--") for flag in (*TRAIN, *PLAN)}


@pytest.mark.parametrize("known", [TRAIN, PLAN, SETTINGS], ids=["train", "plan", "file"])
def test_every_word_gets_its_own_answer(known: list[str]) -> None:
    for setting, words in RENAMED.items():
        for word in words:
            said = hint(word, known)
            mark = "" if known is SETTINGS else "--"
            expected = f"; did you mean {mark}{setting}?" if f"{mark}{setting}" in known else "torchrun" if setting in {
                "gpus", "nodes"} else f": here it is --{setting} of `scalegpt "  # fmt: skip
            assert expected in said, word
    for sentence, words in ANSWERS.items():
        for word in words:
            assert hint(word, known) == ": " + re.sub(
                r"\{(\w+)\}", r"\1" if known is SETTINGS else r"--\1", sentence
            ), word


@pytest.mark.parametrize("words", [HUGGING_FACE, NANOGPT, MEGATRON, TORCHTITAN, ISSUE])
def test_flags_of_other_trainers_get_a_useful_answer(words: str) -> None:
    known = {flag.removeprefix("--") for flag in TRAIN}
    for word in words.split():
        if word in known:
            continue
        said = hint(f"--{word}", TRAIN)
        offered = re.fullmatch(r"; did you mean (--\w+)\?", said)
        assert said.startswith(":") or (offered and offered[1] in TRAIN), word
    assert hint("--batch_size", TRAIN).startswith(": the sequences of one pass on a GPU are --micro_batch")
    assert hint("--rope", TRAIN).startswith(": rotary positions are")


def test_a_sentence_names_every_value_of_the_setting_that_it_lists() -> None:
    said = hint("--swiglu", TRAIN)
    assert said.startswith(": a gate is a value of --activation: ")
    listed = said.rpartition(": ")[2].replace(" or ", ", ").split(", ")
    assert listed == list(SECTIONS["model"].settings()["activation"].metadata["choices"])


@pytest.mark.parametrize(
    ("word", "train", "plan"),
    [
        ("--checkpoint.load_step", "; did you mean --resume_step?", ": here it is --resume_step of `scalegpt train`"),
        ("--ckpt-step", "; did you mean --resume_step?", ": here it is --resume_step of `scalegpt train`"),
        ("--resume_step", "; did you mean --resume_step?", ": it is a flag of `scalegpt train`"),
        ("--cpu_memory", ": here it is --host_memory_gb of `scalegpt plan`", "; did you mean --host_memory_gb?"),
        ("--ram-gb", ": here it is --host_memory_gb of `scalegpt plan`", "; did you mean --host_memory_gb?"),
        ("--host_memory_gb", ": it is a flag of `scalegpt plan`", "; did you mean --host_memory_gb?"),
    ],
)
def test_a_flag_of_one_command_is_found_from_both(word: str, train: str, plan: str) -> None:
    assert hint(word, TRAIN) == train
    assert hint(word, PLAN) == plan


def test_a_misspelling_gets_the_nearest_words() -> None:
    assert hint("--blok_size", TRAIN) == "; did you mean --block_size, --vocab_size?"
    assert hint("zzzz", SETTINGS, "scalegpt train --help") == "; `scalegpt train --help` lists the valid names"
    assert hint("lr", ["help", "debug", "prompt"]) == ": here it is --learning_rate of `scalegpt train`"
    assert hint("--output", ["--out", "--help"]) == "; did you mean --out?"
