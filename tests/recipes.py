"""Bytes per parameter of the literature's training recipes with Adam, for tests of how ZeRO cuts them."""

from collections.abc import Mapping
from dataclasses import dataclass

from scalegpt.config.backends import GRADIENTS, OPTIMIZER_STATE, WEIGHTS, ZERO_CUTS
from scalegpt.planner.memory.states import cut_over


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Bytes of a weight, of a gradient, and of what the optimizer keeps of a parameter, masters included."""

    weights: int
    gradients: int
    optimizer: Mapping[str, int]
    source: str

    @property
    def per_parameter(self) -> int:
        """Bytes per parameter before any sharding."""
        return self.weights + self.gradients + sum(self.optimizer.values())

    def rank_bytes(self, parameters: int, ranks: int, stage: int) -> float:
        """The bytes of the model states on each rank at a stage of ZeRO."""
        each = {WEIGHTS: self.weights, GRADIENTS: self.gradients, OPTIMIZER_STATE: sum(self.optimizer.values())}
        whole = {state: size * parameters for state, size in each.items()}
        return sum(cut_over(whole, ranks, stage, ZERO_CUTS).values())


_MOMENTS = {"first_moment": 4, "second_moment": 4}
_ZERO = "Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1 and figure 1"
_MEGATRON = "Megatron Core, Distributed Optimizer (docs.nvidia.com/megatron-core), theoretical bytes per parameter"

RECIPES = {
    "zero": Recipe(weights=2, gradients=2, optimizer={"master_weights": 4, **_MOMENTS}, source=_ZERO),
    "megatron fp16": Recipe(
        weights=2, gradients=2, optimizer={"master_weights": 4, "master_gradients": 4, **_MOMENTS}, source=_MEGATRON
    ),
    "megatron bf16": Recipe(weights=2, gradients=4, optimizer={"master_weights": 4, **_MOMENTS}, source=_MEGATRON),
    "megatron fp32": Recipe(weights=4, gradients=4, optimizer=_MOMENTS, source=_MEGATRON),
    "pure bf16": Recipe(
        weights=2,
        gradients=2,
        optimizer={"first_moment": 2, "second_moment": 2},
        source="MosaicML llm-foundry's benchmark tables, mp_mode PURE: weights, gradients and moments in bf16",
    ),
}
"""By name. Megatron's distributed optimizer is ZeRO's stage 1."""
