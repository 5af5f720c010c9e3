"""Prepares a run that starts from a folder, and reports its first loss, and transformers' loss on the same tokens."""

import json
import os
import sys
from pathlib import Path

import torch

from scalegpt.backends import World
from scalegpt.training.batches import TrainingBatches
from scalegpt.training.request import Request
from scalegpt.training.setup.prepare import prepare


def main(task_path: str, result_path: str) -> None:
    settings = json.loads(Path(task_path).read_text())
    world = World.join("cpu")
    request = Request.of(
        preset=None, config_file=None, name="run", runs_dir=Path(task_path).parent / "runs",
        settings={**settings, "sample_tokens": 0, "max_iters": 1},
    )  # fmt: skip
    job = prepare(request, world)
    batches = TrainingBatches(job.data.train, job.batch_plan, world, job.run.train.seed)
    (tokens, targets), *_ = list(batches.step(0))
    loss = job.backend.micro_step(tokens, targets, last=True)
    mine = {"loss": loss.item(), "tokens": tokens.tolist(), "targets": targets.tolist()}
    everyones = world.gather(mine)
    batches.close()
    if world.is_first:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(settings["init_from"], dtype=torch.float32)
        tokens = torch.tensor([row for each in everyones for row in each["tokens"]])
        targets = torch.tensor([row for each in everyones for row in each["targets"]])
        with torch.no_grad():
            theirs = torch.nn.functional.cross_entropy(model.eval()(tokens).logits.flatten(0, 1), targets.flatten())
        ours = sum(each["loss"] for each in everyones) / len(everyones)
        found = {"scalegpt": ours, "transformers": theirs.item(), "ranks": len(everyones)}
        Path(result_path).write_text(json.dumps(found))
    world.barrier()
    job.directory.unlock()
    world.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # without finalization, as `run_and_exit` explains
