"""How the model is trained: batch, schedule, optimizer, precision, and when to evaluate, sample and save."""

from dataclasses import dataclass

from scalegpt.config.optimizers import OPTIMIZERS, OptimizerSpec, optimizer_help
from scalegpt.config.settings import Section, setting, steps_of, words_of
from scalegpt.errors import InputError

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
RECOMPUTE = ("none", "selective", "full")
LOSS_ROWS = 512
"""The chunked loss converts the logits of this many tokens at a time to gradients, in fp32.

A CPU uses other numbers.
"""

LOSSES = ("full", "chunked")
PACKINGS = ("contiguous", "documents")
ATTENTION = ("auto", "flash", "mem_efficient", "cudnn", "math")
SCHEDULES = ("cosine", "wsd", "constant")
MOST_STEPS = 10**12
MOST_SECONDS = 30 * 24 * 3600
"""The longest timeout that can be set. Torch's collectives have this timeout if steps have none."""
MOST_MINUTES = 10**7
"""The largest value of a setting in minutes: 19 years."""

ON_SPIKE = ("off", "warn", "skip", "rollback")

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""Programs that a run can log to. The package of each, and the extra that installs it, have the same name."""

LENGTHS = ("max_iters", "max_tokens")
"""The settings that give the length of a run. If both are set, the run ends at whichever comes first."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """The training settings. A micro batch is counted in sequences of ``block_size`` tokens, per rank.

    Raises:
        InputError: a value is outside its bounds, or neither ``max_iters`` nor ``max_tokens`` is set, or documents are
            packed although the attention kernel takes no mask.
    """

    micro_batch: int = setting(
        8,
        "sequences per rank in one forward and backward pass; auto: the fastest that fits",
        minimum=1,
        maximum=1_000_000,
    )
    tokens_per_step: int | None = setting(
        None,
        "tokens of one optimizer step over all ranks; gradient accumulation follows from it; "
        "none: one micro batch on every rank",
        minimum=1,
        maximum=10**12,
    )
    max_iters: int | None = setting(
        1000,
        "optimizer steps of the run; the default applies unless max_tokens is given; if both are given, the shorter "
        "run counts; none: no limit",
        minimum=0,
        maximum=MOST_STEPS,
    )
    max_tokens: int | None = setting(
        None, "tokens of the run; replaces the max_iters of the preset and the default", minimum=1, maximum=10**16
    )
    max_minutes: float | None = setting(
        None,
        "stop this process after this many minutes; the schedule still follows max_iters or max_tokens",
        above=0,
        maximum=MOST_MINUTES,
    )

    init_from: str | None = setting(
        None,
        "start from the weights, the shape and the tokenizer of a Hugging Face folder, a run or a checkpoint; "
        "none: random weights",
        is_path=True,
    )

    optimizer: str = setting("adamw", optimizer_help(), choices=tuple(OPTIMIZERS))
    fused: bool = setting(True, "the fused form of the optimizer; false: the foreach form, which holds more memory")
    learning_rate: float = setting(1e-3, "peak learning rate", above=0, maximum=1e38)
    min_lr_ratio: float = setting(0.1, "the last learning rate as a share of the peak", minimum=0, maximum=1)
    warmup_steps: int = setting(100, "steps of linear warm-up", minimum=0, maximum=MOST_STEPS)
    schedule: str = setting("cosine", "cosine; wsd: warm-up, constant, linear decay; constant", choices=SCHEDULES)
    decay_fraction: float = setting(
        0.2, "share of the steps over which wsd lowers the learning rate", above=0, maximum=1
    )
    weight_decay: float = setting(0.1, "decoupled weight decay, on matrices only", minimum=0, maximum=1000)
    beta1: float = setting(0.9, "decay of AdamW's first moment", minimum=0, below=1)
    beta2: float = setting(0.95, "decay of AdamW's second moment", minimum=0, below=1)
    adam_eps: float = setting(1e-8, "AdamW's epsilon", above=0, maximum=1)
    muon_lr: float = setting(
        0.02,
        "muon: peak learning rate of the blocks' matrices; it follows the schedule of learning_rate",
        above=0,
        maximum=1000,
    )
    muon_momentum: float = setting(0.95, "muon: decay of the Nesterov momentum", minimum=0, below=1)
    grad_clip: float = setting(1.0, "largest gradient norm; 0: no clipping", minimum=0, maximum=10**9)

    max_skipped_in_a_row: int = setting(
        20,
        "end the run after N skipped steps in a row",
        minimum=1,
        maximum=MOST_STEPS,
    )
    on_spike: str = setting(
        "warn",
        "what to do at a loss above median + N × MAD and above 1.2 × median (a spike): warn; skip the step; rollback "
        "to a checkpoint and skip the data",
        choices=ON_SPIKE,
    )
    spike_window: int = setting(
        50, "number of earlier steps whose losses give the median and the MAD", minimum=4, maximum=100_000
    )
    spike_factor: float = setting(
        10.0,
        "N of on_spike: a spike is more than N median absolute deviations (MAD) above the median",
        above=0,
        maximum=10**12,
    )
    max_rollbacks: int = setting(3, "end the run at the next spike after N rollbacks", minimum=1, maximum=1_000_000)

    precision: str = setting(
        "auto",
        "compute dtype; weights, moments and reductions stay fp32; auto: on CUDA bf16 if the card has it, else fp16; "
        "on a CPU bf16 if it was measured to be faster, else fp32",
        choices=PRECISIONS,
    )
    residual_dtype: str = setting(
        "compute", "dtype of the residual stream: the compute dtype, or fp32", choices=("compute", "fp32")
    )
    recompute: str = setting(
        "none",
        "activation checkpointing: none; selective keeps matmul and attention outputs; full keeps each block's input; "
        "auto: the fastest that fits",
        choices=RECOMPUTE,
    )
    loss: str = setting(
        "chunked",
        "full: cross entropy over all logits at once; chunked: over one chunk of tokens after another, to save "
        "memory; auto: the faster that fits",
        choices=LOSSES,
    )
    loss_chunk: int = setting(1024, "tokens per chunk of the chunked loss", minimum=1, maximum=10**9)
    packing: str = setting(
        "contiguous",
        "contiguous: attention crosses from one document to the next; documents: positions restart with each "
        "document, attention stays inside it, and the loss ignores the step to the next document",
        choices=PACKINGS,
    )
    attention: str = setting("auto", "kernel of scaled_dot_product_attention", choices=ATTENTION)
    compile: str = setting("auto", "torch.compile of each block; auto: on CUDA", choices=("auto", "on", "off"))

    eval_every: int = setting(250, "steps between evaluations; 0: only at the end", minimum=0, maximum=MOST_STEPS)
    eval_tokens: int = setting(
        131_072, "held-out tokens per evaluation, spread evenly over the held-out text", minimum=1, maximum=10**12
    )
    sample_every: int = setting(0, "steps between samples; 0: only at the end", minimum=0, maximum=MOST_STEPS)
    sample_tokens: int = setting(128, "tokens per sample; 0: no samples", minimum=0, maximum=1_000_000)
    sample_prompt: str | None = setting(
        None, "the text that samples continue; none: the token that begins or ends a text, or held-out text"
    )
    checkpoint_every: int = setting(500, "steps between checkpoints; 0: only at the end", minimum=0, maximum=MOST_STEPS)
    checkpoint_dir: str | None = setting(
        None,
        "folder or address (s3://BUCKET/FOLDER, gs://, az://) of checkpoints, which are written to its NAME/; none: "
        "checkpoints/ in the run's folder",
        is_path=True,
    )
    checkpoint_minutes: float | None = setting(
        None, "also save X minutes after the last checkpoint; none: only by steps", above=0, maximum=MOST_MINUTES
    )
    keep_checkpoints: int = setting(2, "newest checkpoints kept", minimum=1, maximum=1_000_000)
    keep_best: bool = setting(True, "also keep the checkpoint with the lowest held-out loss")
    async_checkpoint: bool = setting(
        True, "write checkpoints while training continues, from a copy in host memory; false: training waits"
    )
    log_every: int = setting(
        10, "steps between printed lines; metrics.jsonl has every step", minimum=1, maximum=MOST_STEPS
    )
    profile: str | None = setting(
        None,
        "steps A:B to record with torch's profiler: a trace, a table of the slowest operators, and on CUDA a memory "
        "snapshot",
    )
    profile_ranks: str = setting("first", "the ranks that record: the first, or all", choices=("first", "all"))
    log_to: str | None = setting(
        None,
        "trackers to log to besides metrics.jsonl, separated by commas: " + ", ".join(TRACKERS),
        words=TRACKERS,
    )
    first_step_timeout: float = setting(
        1800.0,
        "seconds that the first step, an evaluation or a save may take before the run is ended; 0: no limit",
        minimum=0,
        maximum=MOST_SECONDS,
    )
    step_timeout: float = setting(
        300.0, "seconds that any later step may take; 0: no limit", minimum=0, maximum=MOST_SECONDS
    )
    on_oom: str = setting(
        "stop",
        "what to do after a rank runs out of memory, which ends the run: stop; or shrink: the next start resumes "
        "with half the micro batch and the same tokens per step",
        choices=("stop", "shrink"),
    )
    seed: int = setting(1337, "seed of initialisation, data order and dropout", minimum=0, maximum=2**63 - 1)

    def check(self) -> None:
        """Refuse a schedule without an end, a profile without steps, and packing with a kernel that takes no mask."""
        if self.max_iters is None and self.max_tokens is None:
            raise InputError("the schedule needs an end: set max_iters or max_tokens (max_minutes alone gives none)")
        if self.profile is not None:
            steps_of(self.profile, "profile")
        if self.packs_documents and self.attention in ("flash", "cudnn"):
            raise InputError(
                f"packing documents needs a mask, which attention {self.attention} does not take; use --attention auto"
            )

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """The first and the last step to record with the profiler; None: no step is recorded."""
        return None if self.profile is None else steps_of(self.profile, "profile")

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers in ``log_to``."""
        return words_of(self.log_to)

    @property
    def packs_documents(self) -> bool:
        """Whether attention stays inside a document."""
        return self.packing == "documents"

    @property
    def optimizer_spec(self) -> OptimizerSpec:
        """The specification of the optimizer, in the form that ``fused`` selects."""
        return OPTIMIZERS[self.optimizer][self.fused]
