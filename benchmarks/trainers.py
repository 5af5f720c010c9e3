"""The trainers of the published runs, described in the planner's settings: one entry each, with reasons for all choices.

A row of the tables gives the shape, the card and the batch. The rest is here: which of our backends communicates as the
trainer does, whether its blocks are compiled, how it computes the loss, and in how many bytes it stores and sends
states. ``UNFIT`` has the rules for leaving rows out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from scalegpt.hardware.gpus import Card, find_card

Row = Mapping[str, str]

FULL, FUSED = "full", "fused"
"""How a trainer computes the loss. Full: over logits, with fp32 copies, like our full loss. Fused: in place over
half-precision logits, as special kernels do, or torch's compiler if it compiles the whole model."""


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """One trainer, with the properties in which its time and memory differ from ours.

    Attributes:
        name: the trainer's name.
        source: the beginning of the column ``source`` of its rows.
        settings: our settings that are closest to its own.
        why: the reasons for these settings, a sentence each.
        compiled: whether blocks are compiled, or fused by hand to the same degree, if the row does not say it.
        loss: how it computes the loss.
        scores: whether attention keeps its scores, in half precision, and has one kernel for scale, mask and softmax.
        block_kernels: kernels of one of its blocks in eager mode, forward and backward; None: as many as in our blocks.
        state_bytes: bytes per parameter of weights, gradients and optimizer state; ours has 16.
        sent_bytes: bytes per element of the gradients that it sends; ours sends 4.
        gpus: cards in each of its machines.
        network_gbps: the network of each machine, Gbit/s; None: that of :data:`NETWORK_GBPS`.
        exceptions: a part of ``source`` → the settings of rows whose source contains it.
    """

    name: str
    source: str
    settings: Mapping[str, Any]
    why: str
    compiled: bool = False
    loss: str = FULL
    scores: bool = False
    block_kernels: tuple[int, int] | None = None
    state_bytes: int = 16
    sent_bytes: int = 4
    gpus: int = 8
    network_gbps: float | None = None
    exceptions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_GPT = {"bias": True, "norm": "layernorm", "position": "learned", "activation": "gelu", "tie_head": True}
_LLAMA = {"bias": False, "norm": "rmsnorm", "position": "rope", "activation": "swiglu", "tie_head": False}
_NANO = {"bias": False, "norm": "rmsnorm", "position": "rope", "activation": "relu2", "qk_norm": True, "tie_head": True}
_SHARDED = {"backend": "fsdp", "zero_stage": 3}

LLM_FOUNDRY = Trainer(
    name="llm-foundry",
    source="mosaicml/llm-foundry",
    settings={**_GPT, "backend": "fsdp"},
    loss=FUSED,
    why="FSDP1 sends what FSDP2 sends. Attention is a Triton kernel, the cross entropy a fused one on bf16 "
    "logits. Nothing is compiled. With mp_mode PURE, weights, gradients and moments are in bf16.",
)

TRAINERS = (
    Trainer(
        name="Megatron-DeepSpeed",
        source="VIA-Research/vTrain",
        settings={**_GPT, "backend": "deepspeed", "zero_stage": 0, "recompute": "none"},
        exceptions={"ground_truth_multi": {"zero_stage": 1}},
        scores=True,
        block_kernels=(14, 33),
        sent_bytes=2,
        network_gbps=800,
        why="Measured by the authors of vTrain. fp16 gradients are all-reduced after the last micro step, "
        "hidden behind nothing. Attention keeps its scores: in their model (src/model/gpt_modeling.py) it "
        "is baddbmm, one kernel for scale, mask and softmax, dropout, and bmm. Recompute is none: "
        "use_checkpoint stands in the settings of their simulator, not with the measurements, and the "
        "measured times exclude it. With it a layer 2,048 wide takes 3.6e12 FLOPs and moves 9 GB for 8 "
        "sequences. It took 16 ms. If the 9 GB moved at the data sheet's bandwidth, matmuls would run at "
        "98% of the peak. The ZeRO stage is not stated: 0, but 1 on 64 cards, where the states fit no "
        "card whole. Their settings have the network.",
    ),
    Trainer(
        name="modded-nanogpt",
        source="KellerJordan/modded-nanogpt",
        settings={**_NANO, "backend": "fsdp", "zero_stage": 0},
        exceptions={"8d6193f4": {"optimizer": "muon"}, "ScaleUp1B": {"optimizer": "muon"}},
        compiled=True,
        loss=FUSED,
        why="DDP all-reduces fp32 gradients in the last micro step, behind the backward pass: as our stage 0. "
        "The compiler sees the whole model, loss included. Norms have no weights, which are 0.02% of the "
        "parameters.",
    ),
    Trainer(
        name="llm.c",
        source="karpathy/llm.c",
        settings={**_GPT, "backend": "fsdp", "zero_stage": 2},
        compiled=True,
        loss=FUSED,
        sent_bytes=2,
        why="Its ZeRO-1 reduces bf16 gradients once a step, behind the backward pass, and gathers weights "
        "once: as our stage 2. Its own CUDA kernels fuse what a compiler would, classifier included.",
    ),
    Trainer(
        name="KempnerForge",
        source="KempnerInstitute/KempnerForge",
        settings={**_LLAMA, **_SHARDED},
        block_kernels=(36, 72),
        state_bytes=8,
        gpus=4,
        why="FSDP2. Weights and moments are in bf16, without an fp32 master. The notes say whether it is "
        "compiled. In eager mode its norm is eight operations, its rotation four each for queries and "
        "keys, and Q, K, V, gate and inner layer are a matmul each (kempnerforge/model).",
    ),
    Trainer(
        name="Megatron-Bridge",
        source="NVIDIA-NeMo/Megatron-Bridge",
        settings={**_LLAMA, "qk_norm": True, "backend": "fsdp", "zero_stage": 2},
        compiled=True,
        loss=FUSED,
        why="Its distributed optimizer reduces fp32 gradients once a step, behind the backward pass, and "
        "gathers weights once, behind the forward pass: as our stage 2. Transformer Engine fuses what a "
        "compiler would.",
    ),
    Trainer(
        name="fms-fsdp",
        source="foundation-model-stack/fms-fsdp",
        settings={**_LLAMA, **_SHARDED},
        network_gbps=400,
        why="FSDP1 sends what FSDP2 sends. The rows do not say that it is compiled. Its README has the "
        "network.",
    ),
    Trainer(
        name="accelerate",
        source="huggingface/blog",
        settings={**_LLAMA, "backend": "deepspeed", "zero_stage": 3},
        why="DeepSpeed ZeRO-3 and Hugging Face's model in eager mode. Recompute is not stated and taken as "
        "full: without it the activations of 8 × 4,096 tokens alone exceed the card.",
    ),
    Trainer(
        name="TinyLlama",
        source="jzhang38/TinyLlama",
        settings={**_LLAMA, **_SHARDED},
        compiled=True,
        loss=FUSED,
        why="FSDP1 sends what FSDP2 sends. Norm, rotation, SwiGLU and cross entropy are fused kernels.",
    ),
    Trainer(
        name="transformers",
        source="microsoft/DeepSpeedExamples",
        settings={
            **_GPT, "activation": "gelu_tanh", "attention": "math", "fused": False, "backend": "fsdp", "zero_stage": 0,
        },
        gpus=16,
        why="DDP, or DeepSpeed's ZeRO-1, and Hugging Face's GPT-2 with eager attention, on one machine with "
        "16 cards (its README). AdamW is a loop over tensors.",
    ),
    Trainer(
        name="torchtitan",
        source="pytorch/torchtitan",
        settings={**_LLAMA, **_SHARDED},
        why="FSDP2. The notes of a run say whether it was compiled. In docs/performance.md nothing is said, and "
        "these runs count as eager. Its selective recompute takes every second layer, or every second matmul: "
        "half of what "
        "full recompute takes.",
    ),
)  # fmt: skip


def trainer_of(source: str) -> Trainer:
    """The trainer of a row with this ``source``.

    Raises:
        KeyError: no trainer has this source.
    """
    for trainer in TRAINERS:
        if source.startswith(trainer.source):
            return trainer
    raise KeyError(source)


_H100_HBM2E = replace(
    find_card("H100 SXM"), name="H100 96GB HBM2e", gb=96, gib=95.0, tflops=912.0, gbps=2400.0,
    sources={"tflops": "~between H100 NVL and SXM: its authors say that the peak lies there", "gbps": "its authors"},
)  # fmt: skip

CARDS: Mapping[str, Card] = {
    "A100-80GB-SXM": find_card("A100 80GB"), "A100-80GB": find_card("A100 80GB"), "A100-40GB": find_card("A100 40GB"),
    # 1.3B parameters with 8 sequences of kept activations need more than 40 GB.
    "A100 (memory size not stated)": find_card("A100 80GB"),
    "H100-80GB": find_card("H100 SXM"), "H100-96GB-HBM2e-500W": _H100_HBM2E, "H200-141GB (4/node)": find_card("H200"),
    "V100-32GB": find_card("V100 32GB SXM"), "A10G-24GB": find_card("A10G"), "RTX 4090 24GB": find_card("RTX 4090"),
    "RTX 4070 12GB": find_card("RTX 4070"),
}  # fmt: skip
"""The column ``gpu_type`` → the card."""

NETWORK_GBPS = {"7.0": 800.0, "8.0": 1600.0, "9.0": 3200.0}
"""Compute capability → network of a machine with 8 cards, Gbit/s. It is published for the A100; for the H100 an adapter
of 400 Gbit/s per card is assumed."""


@dataclass(frozen=True)
class Rule:
    """A rule for leaving rows out: a sentence, and a test of a row."""

    reason: str
    holds: Callable[[Row], bool] = field(compare=False)


def _says(column: str, *words: str) -> Callable[[Row], bool]:
    return lambda row: any(word.lower() in row[column].lower() for word in words)


UNFIT = (
    Rule("tensor, pipeline, context or expert parallelism, which the planner does not plan",
         lambda row: any(word.startswith(("TP", "PP", "CP", "EP", "MoE")) for word in row["parallelism"].split())),
    Rule("an optimizer that the planner does not have (SOAP, Shampoo, an update inside the backward pass)",
         _says("source", "SOAP", "8bfe4e35", "e21a2838", "torchtune")),
    Rule("value embeddings, sliding windows or document masks, which the planner's models do not have",
         _says("source", "nanochat", "SoftCap")),
    Rule("sequences of varying length", _says("notes", "variable length")),
    Rule("the micro batch is not given", lambda row: not row["micro_batch"]),
    Rule("no tokens per second are given", lambda row: not row["tokens_per_s_per_gpu"]),
)  # fmt: skip
"""The rules, in order; the first that applies to a row counts. The logs of modded-nanogpt say which run has which
optimizer."""
