"""A prepared run, and two functions that evaluate its model: the held-out loss, and a sample."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from scalegpt.backends import Backend, World
from scalegpt.checkpoint.manifest import Progress
from scalegpt.config import RunConfig
from scalegpt.data.tokenizers import Tokenizer
from scalegpt.data.windows.ledger import Stretch
from scalegpt.data.windows.mixture import Mixture
from scalegpt.errors import InputError
from scalegpt.model.generation import SamplingSettings, generate
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.plan import Plan
from scalegpt.training.batches import HeldOutBatches
from scalegpt.training.output.logger import Logger
from scalegpt.training.resilience.stopping import StopRequest
from scalegpt.training.runs.directory import RunDirectory
from scalegpt.training.runs.metrics_file import History


@dataclass(frozen=True)
class Job:
    """Everything a run needs, made by :func:`scalegpt.training.setup.prepare.prepare`.

    Attributes:
        batch_plan: how a step's tokens are divided into ranks and micro batches.
        plan: the prediction of the run's memory and time.
        data_digest: SHA-256 of the tokenizer and the tokens, and of the shares of several sources.
        prompt: token ids that the samples continue.
        progress: where the run starts: step 0, or the step of a checkpoint.
        stretch: the data ledger's entry (a range of steps with the same data and batch) for the next steps.
        history: what ``metrics.jsonl`` says about the steps up to the start.
        resumed: whether the run starts from a checkpoint.
        stop: whether this process was asked to stop.
        resume_hint: the command that resumes the run later, in words, for example "the same command".
    """

    run: RunConfig
    world: World
    batch_plan: BatchPlan
    plan: Plan
    data: Mixture
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
    stop: StopRequest = field(default_factory=StopRequest)
    resume_hint: str = "the same command"
    compiled: bool = False

    @property
    def document_end(self) -> int | None:
        """The token that ends a document, if documents are packed; else None."""
        return document_end(self.run, self.data.tokenizer)


def document_end(run: RunConfig, tokenizer: Tokenizer) -> int | None:
    """The token that ends a document, if the run packs documents; else None.

    Raises:
        InputError: the run packs documents, and the tokenizer has no token that ends one.
    """
    if not run.train.packs_documents:
        return None
    if tokenizer.end_of_text is None:
        raise InputError(
            f"packing documents needs a token that ends a document, which the {run.data.tokenizer} tokenizer does not have; "
            "use another --tokenizer, or --packing contiguous"
        )
    return tokenizer.end_of_text


class HeldOutLoss(NamedTuple):
    """The result of an evaluation, the same on every rank.

    Attributes:
        value: the mean of the sources' losses, weighted as the sources are in training, however many tokens each gave.
        tokens: number of tokens evaluated.
        by_source: the mean loss per token of each source, in the order of the sources.
    """

    value: float
    tokens: int
    by_source: tuple[float, ...]


def held_out_loss(job: Job, held_out: HeldOutBatches) -> HeldOutLoss:
    """Compute the mean loss per held-out token; all ranks must call it together."""
    sources = job.data.sources
    sums = torch.zeros(len(sources), 2, dtype=torch.float64, device=job.world.device)  # loss × tokens, tokens
    for tokens, targets, count, source in held_out:
        loss = job.backend.evaluate(tokens, targets)
        sums[source] += torch.stack([loss.double() * count, torch.tensor(float(count), device=loss.device).double()])
    totals = job.world.sum(sums).tolist()
    losses = tuple(float(total / counted) for total, counted in totals)
    value = sum(source.weight * loss for source, loss in zip(sources, losses, strict=True))
    return HeldOutLoss(value, sum(int(counted) for _, counted in totals), losses)


def sample_text(job: Job) -> str:
    """Return the sample prompt and its continuation as text. All ranks must call it together, and generate the same tokens.

    Raises:
        DivergedError: the model's logits are not finite. All ranks raise this.
    """
    train, tokenizer = job.run.train, job.data.tokenizer
    settings = SamplingSettings(temperature=0.8, top_k=200, seed=train.seed, max_new_tokens=train.sample_tokens)
    job.backend.model.eval()
    tokens = torch.tensor([job.prompt], device=job.world.device)
    try:
        drawn = generate(job.backend.forward, job.run.model, tokens, settings, limit_vocab=tokenizer.vocab_size)
        ids = [*job.prompt, *(int(token[0]) for token in drawn)]
        return tokenizer.decode(ids[1:] if ids[0] == tokenizer.begin_of_text else ids)
    finally:
        job.backend.model.train()
