"""DeepSpeed ZeRO, stages 0 to 3, with optimizer or parameter offload.

Four choices make it agree with the other backends:

- fp32 masters are exact. DeepSpeed makes its masters from weights that are already rounded to bf16, so they are set
  again from the fp32 values, and the bf16 copies are updated.
- Gradients are accumulated and reduced in fp32, at every stage.
- Stage 0 runs DeepSpeed's fp32 engine, and the model itself computes in bf16, as under ``plain``. DeepSpeed's own bf16 path
  at stage 0 accumulates gradients in bf16.
- The optimizer is torch's, fused, so that nothing is compiled at first use and all backends share one arithmetic. Muon
  is ScaleGPT's own, and works only at stage 0: from stage 1 on, DeepSpeed's optimizers hold flat parts of groups
  instead of matrices.

With ``shard_size`` stage 3 keeps a second copy of the weights, cut among fewer ranks (ZeRO++'s hpZ). DeepSpeed makes it when
a weight that was gathered over all ranks is first released. From then on the weight is gathered from the copy, until the
update. :meth:`DeepSpeedBackend.refresh` drops the copies, since they were made from the weights before.
"""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scalegpt.backends.base import (
    ALL_KEYS,
    DTYPES,
    WEIGHT,
    Backend,
    LossScaler,
    MayStep,
    OptimizerFactory,
    Piece,
    StepResult,
    always,
    clip_factor,
    empty_state,
    fill_step_counts,
    is_finite,
    local_square_norm,
    named,
)
from scalegpt.backends.deepspeed.discard import discarding, forget_gradients
from scalegpt.backends.deepspeed.shards import place_stand_ins, shard
from scalegpt.backends.world import World
from scalegpt.config import RunConfig
from scalegpt.errors import InputError
from scalegpt.model.gpt import GPT, Block
from scalegpt.text import visible


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
        settings: dict[str, Any] | None,
    ) -> None:
        assert settings is not None
        super().__init__(run, world, grad_accum)
        self.settings = settings
        world.ensure_group()
        deepspeed = _import_deepspeed(world)
        # DeepSpeed copies the weights into its own buffers, so they must exist. Their values are loaded later.
        if self.stage < 3:
            model = model.to_empty(device=world.device)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
        else:
            place_stand_ins(model, DTYPES[run.train.precision], world.device)
            # A block's weights are gathered and released together. By default ZeRO-3 releases a layer's weights after each
            # forward pass of the layer, even of a recomputation, after which the backward needs the weights next.
            deepspeed.utils.set_z3_leaf_modules(model, [Block])
        self.engine, self.optimizer = _initialize(deepspeed, model, make_optimizer(named(model)), settings)
        self.model = model
        # Torch makes optimizer states in the first step. DeepSpeed links states to parameters only once, after the first
        # group's step, when the second group has no states yet. So all states are made here.
        self._make_states()
        if self.stage == 3 and model.head is None:
            # The loss uses the embedding's matrix outside of the embedding module: ZeRO-3 must gather the matrix there too.
            deepspeed.zero.register_external_parameter(model, model.wte.weight)

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        """See :meth:`Backend.forward`.

        The model is called through the engine, whose hooks gather weights at stage 3.
        """
        result: Tensor = self.engine(*arguments, **options)
        return result

    def micro_step(self, tokens: Tensor, targets: Tensor, *, last: bool) -> Tensor:
        """See :meth:`Backend.micro_step`. The engine itself divides the loss by the number of micro steps."""
        loss = self.engine(tokens, targets)
        self.engine.backward(loss)
        if not last:
            self.engine.step()  # only counts the micro step
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
        """Whether this class, not DeepSpeed, clips gradients and skips steps: at stage 0, except in fp16.

        In this case DeepSpeed's engine does not report the gradients' norm.
        """
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

    def held(self, keys: Sequence[str] = ALL_KEYS) -> Iterator[Piece]:
        """See :meth:`Backend.held`."""
        holding = self._holding()
        for name, parameter in named(self.model):
            for key in self.keys_of(name):
                piece = holding(name, parameter, key) if key in keys else None
                if piece is not None:
                    yield piece

    def _holding(self) -> Callable[[str, nn.Parameter, str], Piece | None]:
        """The stage's function from name, parameter and key to this rank's piece, or None if the rank has no piece."""
        if self.stage == 0:
            masters = self._masters()
            return lambda name, parameter, key: self._whole(name, masters.get(parameter, parameter), key)
        return self._fragment if self.stage < 3 else self._partition

    def _whole(self, name: str, master: Tensor, key: str) -> Piece:
        """The piece at stage 0: the whole tensor, which every rank holds."""
        values = master if key == WEIGHT else self._inner_optimizer().state[master][key]
        return Piece(name, key, 0, values.detach().view(-1))

    @staticmethod
    def _fragment(name: str, parameter: nn.Parameter, key: str) -> Piece | None:
        """The piece at stages 1 and 2; None if this rank's part of the group contains no element of the parameter.

        DeepSpeed stores this fragment with each parameter.
        """
        link: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if link is None:
            return None
        values = link.get_hp_fragment(None if key == WEIGHT else key)
        return Piece(name, key, link.lp_fragment_address.start, values.detach().view(-1))

    def _partition(self, name: str, parameter: nn.Parameter, key: str) -> Piece | None:
        """The piece at stage 3, where each flattened tensor is cut into equal parts: this rank's part, without padding."""
        wrapper: Any = self.optimizer
        # The public method copies an offloaded optimizer's part to the GPU; this one returns the memory itself.
        part, _ = wrapper._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=True, optim_state_key=None if key == WEIGHT else key
        )
        start = self.shard * part.numel()
        count = min(part.numel(), math.prod(self.model.shapes[name]) - start)
        return Piece(name, key, start, part.detach().view(-1)[:count]) if count > 0 else None

    def _masters(self) -> dict[nn.Parameter, Tensor]:
        """fp16 weight → the fp32 master that DeepSpeed's unfused fp16 optimizer (stage 0) keeps; empty in other cases."""
        wrapper: Any = self.optimizer
        if self.stage > 0 or self.run.train.precision != "fp16":
            return {}
        groups = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        return {parameter: master for low, high in groups for parameter, master in zip(low, high, strict=True)}

    def set_steps(self, steps: int) -> None:
        """See :meth:`Backend.set_steps`."""
        fill_step_counts(self._inner_optimizer(), steps)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the masters into the weights that the model computes with, as DeepSpeed does at the end of a step."""
        wrapper: Any = self.optimizer
        if self.stage == 0:
            for parameter, master in self._masters().items():
                parameter.copy_(master)
        elif self.stage < 3:
            wrapper.update_lp_params()
        else:
            wrapper._partition_all_parameters()
            wrapper.invalidate_secondary_tensor()
            for group in range(len(wrapper.fp32_partitioned_groups_flat)):
                wrapper._reassign_or_swap_out_partitioned_parameters(group)
            kept = wrapper.persistent_parameters  # small tensors, whole on every rank
            if kept:
                kept[0].all_gather(kept)

    def _make_states(self) -> None:
        """Make the optimizer's state for every master that DeepSpeed keeps."""
        inner, wrapper = self._inner_optimizer(), self.optimizer
        if self.stage == 0:
            masters = self._masters()
            for name, parameter in named(self.model):
                master = masters.get(parameter, parameter)
                inner.state[master] = empty_state(inner, master, self.group_of(name))
            return
        parts: list[Tensor] = getattr(wrapper, "fp32_partitioned_groups_flat", None) or [
            part for group in inner.param_groups for part in group["params"]
        ]
        group = self.run.train.optimizer_spec.groups[0]  # a flat part has one state: all parameters need the same ones
        for part in parts:
            inner.state[part] = empty_state(inner, part, group)
        link = getattr(wrapper, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:  # stages 1 and 2 keep views of the state by parameter
            link()

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer inside DeepSpeed's wrapper."""
        inner: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner

    # --- loss scale --------------------------------------------------------------------------------------------------

    @property
    def scaler(self) -> LossScaler:
        """DeepSpeed's dynamic loss scale as a :class:`LossScaler`; a constant 1 if the precision is not fp16."""
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
        """The object that holds DeepSpeed's loss scale: the optimizer's wrapper at stage 0, else its ``loss_scaler``."""
        return getattr(self.optimizer, "loss_scaler", None) or self.optimizer


def _initialize(
    deepspeed: Any, model: GPT, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> tuple[Any, Any]:
    """Make DeepSpeed's engine and its wrapper of the optimizer.

    Raises:
        InputError: DeepSpeed refuses the settings, by an assertion or an error of its own checks.
    """
    # DeepSpeed makes hpZ's groups for the whole process, and refuses to make them again for another engine.
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    try:
        if settings["zero_optimization"]["stage"] == 3:
            shard(deepspeed, model, settings)
        engine, wrapper, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    except (AssertionError, ValueError, NotImplementedError) as error:
        reason = visible(" ".join(str(error).split())[:300]) or type(error).__name__
        raise InputError(
            f"DeepSpeed rejects these settings: {reason}; give another --ds_config, --zero_stage or --offload"
        ) from error
    return engine, wrapper


def _import_deepspeed(world: World) -> Any:
    """Import DeepSpeed for this rank's device. Its log is limited to warnings, and it compiles nothing."""
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    for name, value in (("RANK", world.rank), ("WORLD_SIZE", world.size), ("LOCAL_RANK", world.local_rank)):
        os.environ.setdefault(name, str(value))
    # DeepSpeed calls collectives by names that newer torch releases deprecate; users cannot change that.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    import deepspeed

    # On a CPU DeepSpeed would compile collectives in shared memory, which only its inference calls. That takes ninja, a C++
    # compiler, a folder for extensions and 66 MB of /dev/shm a rank, which killed processes leave behind. DeepSpeed builds
    # only operations that it lists as compatible, so none is listed.
    deepspeed.ops.__compatible_ops__ = dict.fromkeys(deepspeed.ops.__compatible_ops__, False)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
