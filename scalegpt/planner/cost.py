"""What a run takes: hours, GPU hours, and, if a GPU hour has a price, money."""

from dataclasses import dataclass
from typing import Any

from scalegpt.planner.length import total_steps
from scalegpt.planner.plan import Plan

MILLION = 1e6


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The time and the price of a whole run, to ``max_iters`` or ``max_tokens``, without evaluation and checkpoints.

    Attributes:
        hours: hours of training.
        gpus: the GPUs that the plan uses, over all machines.
        tokens: tokens that the run trains on.
        price: price of one GPU for one hour, in any currency; None: not known.
    """

    hours: float
    gpus: int
    tokens: int
    price: float | None = None

    @classmethod
    def of(cls, plan: Plan) -> "Cost | None":
        """The cost of a plan; None if its time is not known, or if it does not run on GPUs."""
        if plan.machine.card is None or not plan.machine.is_gpu:
            return None
        tokens = total_steps(plan.run.train, plan.batch.tokens) * plan.batch.tokens
        hours = tokens / plan.tokens_per_second / 3600
        return cls(hours=hours, gpus=plan.machine.ranks, tokens=tokens, price=plan.machine.gpu_price)

    @property
    def gpu_hours(self) -> float:
        """Hours of all GPUs together."""
        return self.hours * self.gpus

    @property
    def gpu_hours_per_million(self) -> float:
        """GPU hours for a million tokens."""
        return self.gpu_hours / self.tokens * MILLION

    @property
    def money(self) -> float | None:
        """The price of the run; None: the price of a GPU hour is not known."""
        return None if self.price is None else self.gpu_hours * self.price

    @property
    def money_per_million(self) -> float | None:
        """The price of a million tokens; None: the price of a GPU hour is not known."""
        return None if self.price is None else self.gpu_hours_per_million * self.price


def cost_as_dict(plan: Plan) -> dict[str, Any]:
    """The cost of a plan in the form that ``--json`` prints; all values are None if it is not known.

    ``cost_low`` and ``cost_high`` belong to the high and the low end of the likely tokens per second.
    """
    cost = Cost.of(plan)
    low, high = (plan.tokens_per_second / speed for speed in reversed(plan.tokens_per_second_range))
    money = None if cost is None else cost.money
    return {
        "run_hours": None if cost is None else cost.hours,
        "gpu_hours": None if cost is None else cost.gpu_hours,
        "price_per_gpu_hour": None if cost is None else cost.price,
        "cost": money,
        "cost_low": None if money is None else money * low,
        "cost_high": None if money is None else money * high,
        "cost_per_million_tokens": None if cost is None else cost.money_per_million,
    }
