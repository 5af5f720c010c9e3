"""Curves of memory over micro batch size: a plan with every possible micro batch, for each recompute policy."""

from scalegpt.config.train import RECOMPUTE
from scalegpt.errors import InputError
from scalegpt.planner.batches import BatchPlan, divisors
from scalegpt.planner.plan import Estimator, Plan
from scalegpt.planner.search.question import Question, Scheme

Curves = dict[str, dict[int, Plan]]
"""Recompute → micro batch → plan."""


def memory_curves(question: Question, plan: Plan) -> Curves:
    """The plan with every recompute policy and every micro batch that divides the sequences per rank of its step.

    Micro batches are in rising order. Those that the run's own DeepSpeed file forbids are skipped.

    Args:
        question: the question.
        plan: the chosen plan. Its recompute and micro batch are varied even if the user fixed them.
    """
    run, batch = plan.run, plan.batch
    per_rank = batch.micro_batch * batch.grad_accum
    estimator = Estimator(plan.machine, question.calibration)
    curves: Curves = {}
    for recompute in RECOMPUTE:
        curve = curves.setdefault(recompute, {})
        for micro in divisors(per_rank):
            divided = BatchPlan(micro, per_rank // micro, batch.ranks, batch.block_size)
            other = Scheme(run.parallel, recompute, run.train.loss).applied(run, divided)
            try:
                curve[micro] = estimator.plan(other, divided)
            except InputError:
                continue
    return curves
