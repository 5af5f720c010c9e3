"""A prepared run, and the two looks that are taken at its model: the held-out loss, and a sample."""

from dataclasses import dataclass, field

import torch

from scalegpt.backends import Backend, World
from scalegpt.checkpoint.manifest import Progress
from scalegpt.config import RunConfig
from scalegpt.data.ledger import Stretch
from scalegpt.data.shards import TokenSet
from scalegpt.model.generation import SamplingSettings, generate
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.plan import Plan
from scalegpt.training.batches import HeldOutBatches
from scalegpt.training.loggers import Logger
from scalegpt.training.memory import MemoryWatch
from scalegpt.training.resilience.stopping import StopRequest
from scalegpt.training.runs.directory import RunDirectory
from scalegpt.training.runs.history import History


@dataclass
class Job:
    """Everything a run needs, made by :func:`scalegpt.training.setup.prepare`.

    Attributes:
        data_digest: SHA-256 of the data's tokens.
        prompt: ids that the samples continue.
        progress: where the run stands: step 0, or where a checkpoint left it.
        stretch: which data the next steps consume.
        history: what ``metrics.jsonl`` says of the steps so far.
        resumed: whether a checkpoint left it there.
        memory: the prediction.
        watch: measures what is held.
        stop: whether this process was asked to stop.
        again: what goes on with the run once it has ended, in words that begin a clause.
    """

    run: RunConfig
    world: World
    plan: BatchPlan
    data: TokenSet
    data_digest: str
    prompt: list[int]
    backend: Backend
    directory: RunDirectory
    logger: Logger
    total_steps: int
    progress: Progress
    stretch: Stretch
    history: History
    resumed: bool
    memory: Plan
    watch: MemoryWatch
    stop: StopRequest = field(default_factory=StopRequest)
    again: str = "the same command"


def held_out_loss(job: Job, held_out: HeldOutBatches) -> tuple[float, int]:
    """The mean loss over the held-out windows, the same on every rank, and how many tokens it is of."""
    sums = torch.zeros(2, dtype=torch.float64, device=job.world.device)  # loss × tokens, tokens
    for tokens, targets, count in held_out:
        loss = job.backend.evaluate(tokens, targets)
        sums += torch.stack([loss.double() * count, torch.tensor(float(count), device=loss.device).double()])
    total, counted = job.world.sum(sums).tolist()
    return float(total / counted), int(counted)


def sample_text(job: Job) -> str:
    """The sample prompt, continued; every rank generates the same tokens, since a sharded model needs all of them.

    Raises:
        DivergedError: the model's logits are not finite; on all ranks alike.
    """
    train, tokenizer = job.run.train, job.data.tokenizer
    settings = SamplingSettings(temperature=0.8, top_k=200, seed=train.seed, max_new_tokens=train.sample_tokens)
    job.backend.model.eval()
    tokens = torch.tensor([job.prompt], device=job.world.device)
    try:
        drawn = generate(job.backend.forward, job.run.model, tokens, settings, limit_vocab=tokenizer.vocab_size)
        return str(tokenizer.decode([*job.prompt, *(int(token[0]) for token in drawn)]))
    finally:
        job.backend.model.train()
