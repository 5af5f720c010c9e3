"""DeepSpeed ZeRO, stages 0 to 3, with optimizer or parameter offload.

What is made to agree with the other backends:

- **fp32 masters are exact.** DeepSpeed makes its masters from weights already rounded to bf16; we set them afterwards from
  the fp32 values, and refresh the bf16 copies by hand.
- **Gradients accumulate and travel in fp32**, at every stage.
- **Stage 0** runs DeepSpeed's fp32 engine, and the model computes in bf16 by itself, as ``plain`` does: DeepSpeed's own
  bf16 path at stage 0 accumulates gradients in bf16.
- **The optimizer is torch's**, fused, so that nothing is compiled at first use and all backends share one arithmetic.
"""

import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from scalegpt.backends.base import (
    MOMENTS,
    Backend,
    LossScaler,
    MayStep,
    OptimizerFactory,
    ParameterState,
    StepResult,
    always,
    clip_factor,
    is_finite,
    local_square_norm,
)
from scalegpt.backends.deepspeed_discard import discarding, forget_gradients
from scalegpt.backends.plain import named, step_count
from scalegpt.backends.world import World
from scalegpt.config import RunConfig
from scalegpt.model.gpt import GPT, Block


class DeepSpeedBackend(Backend):
    """A DeepSpeed engine around the model.

    Args:
        settings: DeepSpeed's configuration with every ``auto`` filled in.
    """

    def __init__(
        self,
        run: RunConfig,
        world: World,
        grad_accum: int,
        model: GPT,
        make_optimizer: OptimizerFactory,
        settings: dict[str, Any],
    ) -> None:
        super().__init__(run, world, grad_accum)
        self.stage = run.parallel.stage
        self.settings = settings
        world.ensure_group()
        deepspeed = _import_deepspeed(world)
        # DeepSpeed copies the weights into its own buffers: they must exist, though their values come later.
        model = model.to_empty(device="cpu" if run.parallel.offload == "all" else world.device)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        if self.stage == 3:
            # A block's weights come and go together. By default ZeRO-3 releases each layer's after its forward pass, also
            # when that pass is a recomputation whose results the backward needs next.
            deepspeed.utils.set_z3_leaf_modules(model, [Block])
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=make_optimizer(named(model)), config=settings
        )
        self.model = model
        # torch makes the moments in the first step. DeepSpeed links them to parameters after the first group's step, when
        # the second group's do not exist yet, and never again: they must all be there beforehand.
        self._make_moments(steps=0)
        if self.stage == 3 and model.head is None:
            # The loss uses the embedding's matrix outside of the embedding: ZeRO-3 must gather it there too.
            deepspeed.zero.register_external_parameter(model, model.wte.weight)

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        """Through the engine: ZeRO-3 gathers by its hooks."""
        result: Tensor = self.engine(*arguments, **options)
        return result

    def micro_step(self, tokens: Tensor, targets: Tensor, *, last: bool) -> Tensor:
        """See :meth:`Backend.micro_step`; the engine divides by the accumulation steps itself."""
        loss = self.engine(tokens, targets)
        self.engine.backward(loss)
        if not last:
            self.engine.step()  # only counts
        return loss.detach()  # type: ignore[no-any-return]

    def step(self, learning_rate: float, may_step: MayStep = always) -> StepResult:
        """See :meth:`Backend.step`."""
        self.set_learning_rate(learning_rate)
        if self._steps_whole_gradients:
            return self._step_whole_gradients(may_step)
        if not may_step():
            with discarding(self.optimizer):
                self.engine.step()
            assert not self.engine.was_step_applied()
            forget_gradients(self.optimizer)
            return StepResult(math.nan, skipped=True)
        self.engine.step()
        if self.engine.was_step_applied():
            return StepResult(float(self.engine.get_global_grad_norm()), skipped=False)
        forget_gradients(self.optimizer)
        return StepResult(math.inf, skipped=True)

    @property
    def _steps_whole_gradients(self) -> bool:
        """Whether the engine leaves clipping to us: its fp32 stage 0 has no word for the norm it clipped."""
        return self.stage == 0 and self.run.train.precision != "fp16"

    def _step_whole_gradients(self, may_step: MayStep) -> StepResult:
        parameters = list(self.model.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = local_square_norm(gradients, self.world.device).sqrt().item()
        skipped = not may_step() or not is_finite(norm)
        factor = clip_factor(norm, self.run.train.grad_clip, 1.0)
        if skipped:
            for parameter in parameters:
                parameter.grad = None  # the engine's step then changes nothing
        elif factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        self.engine.step()
        return StepResult(norm, skipped)

    # --- canonical state ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See :meth:`Backend.load_weights`."""
        for name, value in weights:
            self._put_weight(self.model.get_parameter(name), value)

    def _put_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        value = value.to(self.world.device)
        if self.stage < 3:
            parameter.copy_(value)
            safe_set_full_fp32_param(
                parameter, value
            )  # does nothing at stage 0 in fp32, where there is no other master
            if self.stage == 0 and self.run.train.precision == "fp16":
                self._put_fp16_master(parameter, value)
            return
        part = self._partition(parameter, value)
        safe_set_local_fp32_param(parameter, part)
        parameter.ds_tensor.data.copy_(part)  # type: ignore[attr-defined]
        if parameter.numel() == value.numel():  # a small tensor, which ZeRO-3 keeps whole on every rank
            parameter.copy_(value)

    def _put_fp16_master(self, parameter: nn.Parameter, value: Tensor) -> None:
        self._fp16_master(parameter).copy_(value)

    def _fp16_master(self, parameter: nn.Parameter) -> Tensor:
        """The fp32 master that DeepSpeed's unfused fp16 optimizer (stage 0) keeps beside an fp16 weight."""
        wrapper: Any = self.optimizer
        for low, high in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for candidate, master in zip(low, high, strict=True):
                if candidate is parameter:
                    return master  # type: ignore[no-any-return]
        raise AssertionError("a parameter outside the optimizer")

    def _partition(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's slice of a flattened tensor as ZeRO-3 cuts it: equal parts, the last one padded with zeros."""
        size = parameter.ds_tensor.numel()
        part = value.new_zeros(size)
        piece = value.flatten()[self.world.rank * size : (self.world.rank + 1) * size]
        part[: piece.numel()] = piece
        return part

    @torch.no_grad()
    def states(self) -> Iterator[ParameterState]:
        """See :meth:`Backend.states`."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in named(self.model):
            if self.stage == 0:
                master = self._master(parameter)
                weight, moments = master, {key: self._inner_optimizer().state[master][key] for key in MOMENTS}
            else:
                weight = safe_get_full_fp32_param(parameter)
                moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            yield ParameterState(
                name,
                weight.detach().to("cpu", torch.float32, copy=True),
                {key: moment.to("cpu", copy=True) for key, moment in moments.items()},
            )

    def _master(self, parameter: nn.Parameter) -> Tensor:
        return self._fp16_master(parameter) if self.run.train.precision == "fp16" else parameter

    @torch.no_grad()
    def load_states(self, states: Iterable[ParameterState], steps: int) -> None:
        """See :meth:`Backend.load_states`."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        for state in self._inner_optimizer().state.values():
            state["step"].fill_(steps)
        for entry in states:
            parameter = self.model.get_parameter(entry.name)
            self._put_weight(parameter, entry.weight)
            for key, value in entry.moments.items():
                if self.stage == 0:
                    self._inner_optimizer().state[self._master(parameter)][key].copy_(value)
                elif self.stage < 3:
                    safe_set_full_optimizer_state(parameter, value.to(self.world.device), key)
                else:
                    safe_set_local_optimizer_state(
                        parameter, self._partition(parameter, value.to(self.world.device)), key
                    )

    def _make_moments(self, steps: int) -> None:
        """Make AdamW's state for every master that DeepSpeed keeps."""
        inner, wrapper = self._inner_optimizer(), self.optimizer
        masters: list[Tensor] = getattr(wrapper, "fp32_partitioned_groups_flat", None) or [
            master for group in inner.param_groups for master in group["params"]
        ]
        for master in masters:
            inner.state[master] = {
                "step": step_count(inner, master, steps),
                **{key: torch.zeros_like(master, requires_grad=False) for key in MOMENTS},
            }
        link = getattr(wrapper, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:  # stages 1 and 2 keep views of the state by parameter
            link()

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        """Torch's optimizer inside DeepSpeed's wrapper."""
        inner: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner

    # --- loss scale --------------------------------------------------------------------------------------------------

    @property
    def scaler(self) -> LossScaler:
        """DeepSpeed's own dynamic scale, in our terms."""
        if self.run.train.precision != "fp16":
            return LossScaler()
        theirs = self._their_scaler()
        good = int(theirs.cur_iter - theirs.last_overflow_iter - 1)
        return LossScaler(scale=float(theirs.cur_scale), good_steps=good, dynamic=True)

    def load_scaler(self, scale: float, good_steps: int) -> None:
        """See :meth:`Backend.load_scaler`."""
        if self.run.train.precision == "fp16":
            theirs = self._their_scaler()
            theirs.cur_scale, theirs.last_overflow_iter = scale, theirs.cur_iter - 1 - good_steps

    def _their_scaler(self) -> Any:
        """The object with ``cur_scale``: the stage-0 wrapper itself, or the ZeRO wrapper's ``loss_scaler``."""
        return getattr(self.optimizer, "loss_scaler", None) or self.optimizer


def _import_deepspeed(world: World) -> Any:
    """DeepSpeed, told which device we compute on and to keep its voice down, before it looks around for itself."""
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    for name, value in (("RANK", world.rank), ("WORLD_SIZE", world.size), ("LOCAL_RANK", world.local_rank)):
        os.environ.setdefault(name, str(value))
    # DeepSpeed calls collectives by names that newer torch releases deprecate; that is between the two.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
