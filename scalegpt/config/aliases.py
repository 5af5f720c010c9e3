"""What other trainers call things: each word leads to the setting that it means here, or to a sentence.

The words are those of nanoGPT, litgpt, torchtitan, Hugging Face's Trainer, Megatron-LM, llm-foundry and DeepSpeed. The
command line, configuration files and the planner all ask :func:`hint`.
"""

import re
from collections.abc import Iterable

from scalegpt.errors import nearest

_BATCH = (
    "the sequences of one pass on a GPU are {micro_batch}, and {tokens_per_step} counts the tokens of a step over all GPUs; "
    "gradient accumulation follows from both"
)
_EPOCHS = "the trainer counts steps and tokens, not epochs: use {max_tokens} or {max_iters}"
_DECAY = (
    "the learning rate decays to the end of the run; {schedule} says how, and {decay_fraction} over which share (wsd)"
)
_DATA_PARALLEL = (
    "every GPU trains on its own data ({backend} and {zero_stage} shard the states); there is no other parallelism"
)
_RANKS = "the launcher starts one rank for each GPU: torchrun --nproc_per_node N --nnodes M, or deepspeed --num_gpus N"
_TRACKERS = "no tracker is called: metrics.jsonl and report.html in the run's folder have the curves"
_RESUME = (
    "the same command resumes the run from its newest checkpoint, with --resume_step N from that of step N; "
    "--fresh starts a new run beside it"
)
_WORKERS = "each rank reads its batches from the token file itself: there are no loader workers"
_ADAPTERS = "all weights are trained: there are no adapters and no quantized weights"
_POSITIONS = "positions are learned embeddings: there is no rotary or relative form"

RENAMED: dict[str, str] = {
    "n_layer": "n_layers num_layers num_hidden_layers layers depth num_blocks",
    "n_embd": "n_embed d_model dim model_dim hidden_size hidden_dim embed_dim embd width embedding_size",
    "n_head": "n_heads num_heads num_attention_heads heads",
    "block_size": (
        "seq_len seq_length sequence_length max_seq_len max_seq_length max_sequence_length context_length "
        "context_size context_window context_len context ctx ctx_len n_ctx n_positions "
        "max_position_embeddings max_length block_len encoder_seq_length"
    ),
    "vocab_size": "n_vocab vocab vocabulary padded_vocab_size make_vocab_size_divisible_by",
    "tie_head": (
        "tie_word_embeddings tie_embeddings tie_weights weight_tying tied tied_embeddings "
        "untie_embeddings_and_output_weights use_tied_embeddings"
    ),
    "bias": "use_bias add_bias_linear disable_bias_linear no_bias add_qkv_bias",
    "dropout": (
        "attention_dropout attn_dropout attn_pdrop resid_pdrop embd_pdrop hidden_dropout "
        "hidden_dropout_prob emb_pdrop drop_rate"
    ),
    "activation": "act hidden_act activation_function act_fn nonlinearity",
    "micro_batch": (
        "device_batch_size per_device_train_batch_size per_device_batch_size per_gpu_batch_size "
        "train_micro_batch_size_per_gpu micro_batch_size microbatch_size device_train_microbatch_size "
        "local_batch_size mbs bs_per_gpu micro_bs"
    ),
    "max_iters": (
        "steps max_steps num_steps n_steps train_steps training_steps total_steps max_train_steps "
        "num_training_steps num_iterations iters iterations n_iters train_iters max_iter niter"
    ),
    "max_tokens": "tokens train_tokens num_tokens total_tokens token_budget max_train_tokens max_duration",
    "max_minutes": "max_time time_limit max_hours exit_duration_in_mins",
    "learning_rate": "lr max_lr peak_lr base_lr initial_lr optimizer_lr",
    "min_lr_ratio": "alpha_f final_lr_frac min_lr_factor min_lr_rate",
    "schedule": (
        "lr_schedule lr_scheduler lr_scheduler_type scheduler scheduler_type lr_decay_style "
        "learning_rate_decay lr_decay decay_lr learning_rate_schedule"
    ),
    "decay_fraction": (
        "cooldown_frac cooldown_fraction warmdown_ratio decay_ratio lr_wsd_decay_iters warmdown_iters "
        "cooldown wsd_decay"
    ),
    "warmup_steps": ("warmup warmup_iters warmup_iterations num_warmup_steps lr_warmup_steps lr_warmup_iters t_warmup"),
    "optimizer": "optim opt optimizer_name optimizer_type",
    "weight_decay": "wd decay l2",
    "beta1": "adam_beta1 beta_1 adam_b1",
    "beta2": "adam_beta2 beta_2 adam_b2",
    "adam_eps": "eps epsilon adam_epsilon",
    "muon_momentum": "momentum",
    "grad_clip": (
        "clip clip_grad clip_grad_norm max_grad_norm max_norm gradient_clipping grad_norm "
        "gradient_clip_val grad_norm_clip gradient_clip"
    ),
    "seed": "random_seed manual_seed data_seed global_seed rng_seed",
    "precision": "dtype torch_dtype amp mixed_precision param_dtype mixed_precision_param compute_dtype ptdtype",
    "attention": (
        "attn attn_implementation attn_impl flash flash_attn flash_attention use_flash_attn "
        "use_flash_attention attention_backend use_flash sdpa"
    ),
    "recompute": (
        "gradient_checkpointing activation_checkpointing activation_checkpoint checkpoint_activations "
        "recompute_granularity recompute_activations remat ac ac_mode activation_checkpoint_mode "
        "grad_checkpointing grad_checkpoint"
    ),
    "compile": "torch_compile use_compile compile_model no_compile",
    "loss": "fused_loss chunked_loss cross_entropy fused_cross_entropy liger",
    "eval_every": (
        "eval_interval eval_steps eval_freq eval_frequency val_every val_interval val_check_interval "
        "validation_freq validation_interval evaluation_strategy eval_strategy val_loss_every"
    ),
    "eval_tokens": "val_tokens eval_size",
    "sample_every": "sample_interval generate_every sample_freq",
    "log_every": (
        "log_interval logging_steps log_freq print_freq print_every console_log_interval log_steps logging_interval"
    ),
    "checkpoint_every": (
        "save_interval save_steps save_every save_freq checkpoint_interval ckpt_interval ckpt_every "
        "checkpoint_freq save_strategy always_save_checkpoint"
    ),
    "keep_checkpoints": (
        "save_total_limit keep_last keep_last_k keep_latest_k max_checkpoints "
        "save_num_checkpoints_to_keep num_checkpoints"
    ),
    "keep_best": "load_best_model_at_end save_best",
    "input_file": (
        "dataset dataset_name dataset_path data data_dir data_path data_file train_file train_data "
        "train_data_path input inputs input_dir text_file corpus files file"
    ),
    "tokenizer": "tokenizer_name tokenizer_type tokenizer_path tokenizer_name_or_path tokenizer_model",
    "val_fraction": (
        "val_split validation_split val_ratio val_frac val_split_fraction test_size "
        "validation_split_percentage eval_split"
    ),
    "backend": "strategy distributed_backend distributed_strategy ddp fsdp parallel use_fsdp ddp_backend",
    "zero_stage": "stage zero zero_optimization sharding_strategy zero3 zero2",
    "offload": (
        "cpu_offload offload_optimizer optimizer_offload offload_param offload_params fsdp_cpu_offload "
        "optimizer_cpu_offload"
    ),
    "ds_config": "deepspeed deepspeed_config deepspeed_config_file ds_config_file",
    "runs_dir": (
        "out_dir output_dir save_dir save_folder log_dir logdir checkpoint_dir ckpt_dir out output "
        "dump_folder exp_dir run_dir"
    ),
    "model_name": "run_name exp_name experiment experiment_name name run_id job_name",
    "preset": "model model_type model_size model_flavor flavor size",
    "config_file": "config config_path cfg conf configuration yaml job_config_file",
    "fresh": "overwrite overwrite_output_dir restart from_scratch scratch",
    "resume_step": (
        "ckpt_step load_step resume_iter resume_iteration resume_from_step resume_from_iter load_iteration start_step "
        "start_iter checkpoint_step from_step step rollback_step"
    ),
    "gpu": "card gpu_type gpu_name accelerator gpu_model",
    "gpus": "num_gpus n_gpus ngpu ngpus gpu_count nproc_per_node devices num_devices n_gpu gpus_per_node",
    "nodes": "nnodes num_nodes n_nodes machines num_machines",
    "memory_gb": "vram vram_gb gpu_memory gpu_mem memory mem gpu_memory_gb",
    "host_memory_gb": (
        "host_memory host_mem host_ram cpu_memory cpu_memory_gb cpu_mem cpu_ram ram ram_gb system_memory system_ram dram"
    ),
    "network_gbps": "network bandwidth internode_gbps network_bandwidth ib_gbps",
}
"""Setting or flag → what others call it, with spaces between."""

TOLD: dict[str, str] = {
    _BATCH: (
        "batch_size batch bs train_batch_size global_batch_size global_train_batch_size total_batch_size "
        "gbs gradient_accumulation_steps grad_accum grad_accum_steps gradient_accumulation "
        "accumulate_grad_batches accumulation_steps gas effective_batch_size"
    ),
    "evaluation uses the micro batch of training; {eval_tokens} says how much is read": (
        "eval_batch_size per_device_eval_batch_size val_batch_size device_eval_batch_size"
    ),
    _EPOCHS: "epoch epochs num_epochs n_epochs max_epochs num_train_epochs train_epochs",
    "{min_lr_ratio} is the last learning rate as a share of the peak, such as 0.1": (
        "min_lr min_learning_rate end_lr final_lr lr_end"
    ),
    "{eval_tokens} is the number of tokens that an evaluation reads": (
        "eval_iters eval_max_iters eval_batches limit_val_batches val_max_steps val_batches"
    ),
    _DECAY: "lr_decay_iters lr_decay_steps lr_decay_samples decay_steps decay_iters t_max lr_decay_ratio",
    "warm-up is counted in steps: use {warmup_steps}": ("warmup_ratio warmup_fraction lr_warmup_fraction warmup_frac"),
    "the betas are two settings: {beta1} and {beta2}": "betas adam_betas",
    "use {precision} bf16, fp16 or fp32": "bf16 fp16 fp32 bfloat16 float16 float32 half fp16_opt_level",
    "fp32 matmuls are computed in fp32: TF32 is not used; {precision} bf16 is faster": ("tf32 allow_tf32 use_tf32"),
    "nothing is computed in fp8: {precision} is bf16, fp16 or fp32": "fp8 float8 fp8_format enable_fp8 use_fp8",
    "the feed-forward layer is always four times {n_embd} wide": (
        "intermediate_size ffn_hidden_size mlp_ratio expansion_ratio n_inner ffn_dim mlp_hidden_size "
        "multiple_of ffn_dim_multiplier d_ff"
    ),
    "the feed-forward layer has no gate: {activation} is gelu, gelu_tanh or relu2": "swiglu glu use_swiglu geglu",
    "every head has its own keys and values: there is no grouped-query attention; {n_head} counts the heads": (
        "num_key_value_heads n_kv_head n_kv_heads num_kv_heads num_query_groups gqa mqa group_query_attention kv_heads"
    ),
    "the width of a head is {n_embd} / {n_head}": "head_dim head_size kv_channels d_head d_kv",
    _POSITIONS: (
        "rope rope_theta rope_scaling rope_base rotary rotary_percent rotary_pct alibi use_rope "
        "use_rotary_position_embeddings position_embedding_type rotary_base pos_emb"
    ),
    "the norms are LayerNorm with epsilon 1e-5": (
        "norm rmsnorm rms_norm norm_type normalization norm_eps layer_norm_eps layer_norm_epsilon "
        "rms_norm_eps layernorm_epsilon"
    ),
    "the model is dense: there are no experts": "moe num_experts n_experts experts top_k_experts",
    "attention sees the whole block: there is no window": "sliding_window window_size attention_window",
    "weights begin as GPT-2's do; that is not a setting": "init_std init_method_std initializer_range",
    "the loss is plain cross entropy": "label_smoothing z_loss label_smoothing_factor",
    "no average of the weights is kept": "ema use_ema ema_decay swa",
    _DATA_PARALLEL: (
        "tensor_parallel tensor_parallel_size tensor_model_parallel_size tp tp_size pipeline_parallel "
        "pipeline_model_parallel_size pp pp_size context_parallel context_parallel_size cp "
        "expert_parallel ep sequence_parallel data_parallel_shard_degree data_parallel_replicate_degree "
        "dp tensor_parallel_degree"
    ),
    _RANKS: "world_size rank master_port master_addr rdzv_endpoint dist_url node_rank hostfile",
    _TRACKERS: (
        "wandb wandb_project wandb_log wandb_run_name wandb_entity use_wandb wandb_run report_to "
        "tensorboard tensorboard_dir tracker logger loggers mlflow comet log_to enable_tensorboard "
        "enable_wandb"
    ),
    _RESUME: (
        "resume resume_from resume_from_checkpoint init_from load load_path load_checkpoint restore "
        "continue autoresume initial_load_path"
    ),
    "training begins from random weights or from the run's own checkpoint: other models are not read": (
        "pretrained model_name_or_path pretrained_model_name_or_path finetune base_model"
    ),
    _WORKERS: ("num_workers dataloader_num_workers workers n_workers prefetch_factor pin_memory dataloader_pin_memory"),
    _ADAPTERS: "lora lora_rank lora_r peft use_peft qlora load_in_8bit load_in_4bit quantization quantize bnb",
    "texts are packed into blocks one after the other, always": "packing pack group_texts padding pad_to",
    "data are shuffled by seed and step; that is not a setting": "shuffle no_shuffle shuffle_data",
    "`scalegpt sample` draws texts: scalegpt sample RUN --temperature T --top_k K": (
        "temperature top_k top_p max_new_tokens num_samples"
    ),
    "`scalegpt checkpoint convert` writes the weights as one file": ("export push_to_hub save_safetensors hf_export"),
    "there is no evaluation alone: training evaluates every {eval_every} steps and at its end": (
        "eval_only do_eval do_train test_only"
    ),
    "steps that are not finite are skipped by themselves; {on_spike} says what becomes of spikes": (
        "skip_nan loss_scale initial_loss_scale check_for_nan_in_loss"
    ),
}
"""A sentence → the words of others that it answers; {name} stands for a setting."""

_ELSEWHERE = {
    **dict.fromkeys(
        ("runs_dir", "model_name", "fresh", "device", "trust_checkpoint", "allow_change", "resume_step"),
        "scalegpt train",
    ),
    **dict.fromkeys(
        ("gpu", "memory_gb", "host_memory_gb", "network_gbps", "html", "trace", "no_calibration"), "scalegpt plan"
    ),
}
"""Flag → the command that has it."""


def _squeezed(word: str) -> str:
    """A word without what people leave out: seqlen is seq_len."""
    return word.replace("_", "").replace(".", "")


_SETTING_OF = {_squeezed(word): setting for setting, words in RENAMED.items() for word in words.split()}
_SENTENCE_OF = {_squeezed(word): sentence for sentence, words in TOLD.items() for word in words.split()}


def hint(word: object, known: Iterable[str], listed: str | None = None) -> str:
    """A hint for a word that is no setting: what it is called here, a sentence, or else the nearest known words.

    Args:
        word: what was given, a flag such as ``--batch-size``, or a key.
        known: what might have been meant, all of them flags or all keys.
        listed: the command that lists the known words, for where they are too many for a line.

    Returns:
        Text that begins with ``;`` or ``:``, ready to append to a message.
    """
    names = {_plain(name): name for name in known}
    mark = "--" if all(name.startswith("--") for name in names.values()) else ""
    plain, found = _plain(word), ""
    last = plain.rsplit(".", 1)[-1]
    for own in dict.fromkeys((plain, last, last.removeprefix("no_").removeprefix("use_"))):
        setting = own if own in names else _SETTING_OF.get(_squeezed(own))
        if setting in names:
            return f"; did you mean {names[setting]}?"
        found = found or _elsewhere(own)
    near = nearest(plain, names, listed)
    if "did you mean" in near:
        near = near.replace(" mean ", f" mean {mark}").replace(", ", f", {mark}")
        found = found if "micro_batch" in names else ""  # of other commands the flags are not the trainer's settings
    return re.sub(r"\{(\w+)\}", rf"{mark}\1", found) or near


def _elsewhere(word: str) -> str:
    """What is said of a word that is no setting of the command, but of another one, or nothing at all; empty: nothing."""
    setting = _SETTING_OF.get(_squeezed(word), word)
    if setting in {"gpus", "nodes"}:
        return f": {_RANKS}"
    if setting in _ELSEWHERE or setting != word:
        command = _ELSEWHERE.get(setting, "scalegpt train")
        return f": that is --{setting} of `{command}`" if setting != word else f": `{command}` has it"
    sentence = _SENTENCE_OF.get(_squeezed(word))
    return f": {sentence}" if sentence else ""


def _plain(word: object) -> str:
    """A flag or key as the table has it: in lower case, with ``_`` for ``-``, without the hyphens that begin it."""
    return str(word).strip().lstrip("-").lower().replace("-", "_")
