"""One question to the planner and its answer, for one run on one machine. :mod:`scalegpt.planner.tables` asks several.

The command line reads flags into an :class:`Asked` and prints an :class:`Answer`; the trainer uses the same two
classes. If a machine's memory is not known, the planner chooses nothing and predicts the run with its own settings.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from scalegpt.architecture.counting import count_parameters
from scalegpt.config import RunConfig
from scalegpt.config.run import AUTO, PLANNED
from scalegpt.hardware.gpus import GB
from scalegpt.hardware.machine import ASSUMED, HOST_LEAST, HOST_MOST, HOST_PER_CARD, Machine
from scalegpt.planner.batches import plan_batches
from scalegpt.planner.checks import (
    INSTALL,
    check_attention,
    check_optimizer,
    check_ranks,
    is_installed,
    resolve_precision,
    vocabulary_remark,
    with_expected_vocabulary,
    with_prepared_tokenizer,
)
from scalegpt.planner.cost import cost_as_dict
from scalegpt.planner.length import length_notes
from scalegpt.planner.plan import Plan
from scalegpt.planner.precision import fastest_precision
from scalegpt.planner.search.advice import Alternative, Remedy, alternatives, remedies
from scalegpt.planner.search.question import MARGIN, Question
from scalegpt.planner.search.room import choose_in_room, fixed_in_room
from scalegpt.planner.source import Source, folder_to_start_from, source_of
from scalegpt.planner.start.command import launch_command, run_words
from scalegpt.planner.start.launching import launch_text
from scalegpt.planner.time.calibration import Calibration
from scalegpt.planner.time.rates import basis, network_gbit
from scalegpt.system.invocation import IN_BROWSER

Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question to the planner: a run, a machine, and which settings are fixed.

    Attributes:
        run: the run with all settings that were given. The planner may choose the settings that are ``auto`` or not given.
        source: the source of all settings that no flag gives.
        named: names of the settings that the source and the flags give.
        all_cards: whether the plan must use all cards of the machine.
        fixed: names of the settings that must stay as they are.
        machine: the machine to plan for.
        calibration: measurements of earlier runs, which correct the overheads (memory outside the step's tensors).
        margin: share of a card's memory to leave free.
    """

    run: RunConfig
    source: Source
    fixed: frozenset[str]
    machine: Machine
    calibration: Calibration = field(default_factory=Calibration)
    margin: float = MARGIN
    named: frozenset[str] = frozenset()
    all_cards: bool = False

    @classmethod
    def of(
        cls,
        *,
        preset: str | None,
        config_file: str | None,
        hf: str | None = None,
        flags: Values,
        machine: Machine,
        calibration: Calibration | None = None,
        margin: float = MARGIN,
        given_in: str = "command line",
    ) -> "Asked":
        """Make the question for a preset, a file or a Hugging Face model, overridden by flags.

        ``given_in`` says in errors where the flags come from; the other arguments are those of :func:`source_of`.

        Raises:
            InputError: a name is unknown, or settings contradict each other.
        """
        if hf is None and flags.get("init_from") is not None:  # the run starts from a folder, and has its shape
            hf = folder_to_start_from(flags["init_from"])
            flags = {key: value for key, value in flags.items() if key != "init_from"}
        source = source_of(preset=preset, config_file=config_file, hf=hf, flags=flags)
        flags = {**source.flags, **flags}
        run = source.resolved(flags, given_in) if flags else source.run
        given = {*flags, *(source.stated if preset is None else ())}
        if hf is None:  # a model has its own tokenizer and vocabulary
            run = with_prepared_tokenizer(run, given)
        if preset is None or not run.model.vocab_size or run.data.tokenizer != source.run.data.tokenizer:
            run = with_expected_vocabulary(run, given)
        fixed = frozenset(flags) - run.auto
        if "ds_config" in fixed:  # a DeepSpeed file is written for one stage and one kind of offload
            fixed |= {"backend", "zero_stage", "offload", "shard_size"}
        return cls(
            run=run,
            source=source,
            fixed=fixed,
            machine=machine,
            calibration=calibration or Calibration(),
            margin=margin,
            named=source.stated | flags.keys(),
        )

    def question(self) -> tuple[Question, tuple[str, ...]]:
        """The question for the search, and one-line remarks. All checks that need no search are made here.

        Raises:
            InputError: the fixed settings do not work on this machine.
        """
        machine, notes = self.machine, list[str]()
        run = replace(self.run, auto=frozenset())
        precision = resolve_precision(run.train.precision, machine.card, machine.capability)
        if run.train.precision == AUTO and not machine.is_gpu:
            precision = fastest_precision(run, machine)
        run = replace(run, train=run.train.changed(precision=precision))
        check_attention(run, precision, machine.card)
        if self.fixed & {"backend", "zero_stage", "shard_size"} or machine.usable_bytes is None:
            remark = check_ranks(
                run, machine.ranks, stage_fixed="zero_stage" in self.fixed and "ds_config" not in self.fixed
            )
            notes += [remark] if remark and machine.usable_bytes is not None else []
        if self.fixed >= {"backend", "zero_stage", "offload"} or machine.usable_bytes is None:
            check_optimizer(run)
        plan_batches(run, machine.ranks, micro_fixed="micro_batch" in self.fixed)
        vocabulary = vocabulary_remark(run)
        notes += [vocabulary] if vocabulary else []
        notes += self.source.notes(self.fixed)
        open_ = PLANNED - self.fixed
        if machine.nodes == 1 and run.parallel.shard_size is None:
            open_ -= {"shard_size"}  # on one machine there is no other to choose
        return (
            Question(run, machine, open_, self.margin, self.calibration, fewer=not self.all_cards),
            (*notes, *machine_notes(machine), *_warnings(self.calibration)),
        )


def machine_notes(machine: Machine) -> Iterator[str]:
    """One-line remarks on a machine: its own notes, and which of its figures are estimated or assumed."""
    yield from machine.notes
    card = machine.card
    if card is None:
        return
    if card.is_estimated and not card.is_cpu:
        yield f"the usable memory of {card.name} is estimated"
    if machine.nodes > 1 and machine.network_gbps is None:
        yield f"a network of {network_gbit(card, machine):g} Gbit/s for each machine is assumed; --network gives the true one"


def host_notes(*plans: Plan | None) -> Iterator[str]:
    """At most one remark: how much host memory was assumed, if a plan offloads."""
    known = [plan.machine for plan in plans if plan is not None and plan.host_bytes]
    sizes = {machine.host_bytes for machine in known if machine.host_source == ASSUMED and machine.host_bytes}
    if not sizes:
        return
    how = f"{HOST_PER_CARD} times its cards' memory, from {HOST_LEAST / GB:.0f} GB to {HOST_MOST / GB:,.0f} GB"
    said = f"{min(sizes) / GB:,.0f} GB of host memory ({how})" if len(sizes) == 1 else f"{how} of host memory"
    yield f"for offload, each machine is assumed to have {said}; --host_memory_gb gives the true one"


def _warnings(measured: Calibration) -> Iterator[str]:
    if measured.warning:
        yield f"warning: calibration {measured.warning}"


@dataclass(frozen=True)
class Answer:
    """The planner's answer to one question.

    Attributes:
        asked: the question as the user asked it.
        question: the question that the search received.
        choice: the chosen plan; if none fits, the plan that lacks least memory.
        notes: remarks, a line each.
        alternatives: other plans, each with the reason why it was not chosen.
        remedies: if no plan fits, changes that would make the run fit.
        trace: phase → bytes that a trace of the step measured; None where no trace was asked for.
    """

    asked: Asked
    question: Question
    choice: Plan
    notes: tuple[str, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    trace: dict[str, int] | None = None

    def command(self, plan: Plan | None = None) -> str:
        """The command line that trains ``plan``, a plan for the same run; None: the chosen plan."""
        source = self.asked.source
        return launch_command(plan or self.choice, source.trained, source.train_words, self.asked.fixed)

    def launch(self, launcher: str) -> str:
        """The command or file that trains the chosen plan under a launcher of :mod:`scalegpt.planner.start.launching`."""
        source, plan = self.asked.source, self.choice
        words = run_words(plan, source.trained, source.train_words, self.asked.fixed)
        return launch_text(plan, words, launcher)

    def as_dict(self) -> Values:
        """The answer in the form that ``--json`` prints."""
        choice = self.plan_as_dict(self.choice)
        if self.trace is not None:
            choice["trace"] = {"peak_bytes": max(self.trace.values()), "phases": self.trace}
        card = self.choice.machine.card
        return {
            "model": model_as_dict(self.choice.run),
            "gpu": machine_as_dict(self.question.machine),
            "margin": self.question.margin,
            "choice": choice,
            "alternatives": [
                {**self.plan_as_dict(each.plan), "differs": each.differs, "why_not": each.why_not}
                for each in self.alternatives
            ],
            "would_fit": self.plan_as_dict(self.remedies[0].plan) if self.remedies else None,
            "remedies": [
                {"what": each.what, "gpu": machine_as_dict(each.plan.machine), **self.plan_as_dict(each.plan)}
                for each in self.remedies
            ],
            "notes": list(self.notes),
            "times_rest_on": None if card is None else basis(card, measured=self.choice.is_measured),
        }

    def plan_as_dict(self, plan: Plan) -> Values:
        """A plan for the same run, with its command line, in the form that ``--json`` prints."""
        return {**plan.as_choice(self.command(plan)), **cost_as_dict(plan)}


def model_as_dict(run: RunConfig) -> Values:
    """A model's name, number of parameters and shape, in the form that ``--json`` prints."""
    shape = asdict(run.model)
    return {"name": run.name, "parameters": count_parameters(run.model).total, **shape}


def machine_as_dict(machine: Machine) -> Values:
    """A machine in the form that ``--json`` prints."""
    return {
        "name": machine.name,
        "usable_bytes": machine.usable_bytes,
        "count": machine.gpus,
        "nodes": machine.nodes,
        "network_gbps": machine.network_gbps,
        "network_kind": machine.network_kind,
        "host_bytes": machine.host_bytes,
        "host_source": machine.host_source,
    }


def answer(asked: Asked, *, explain: bool = True) -> Answer:
    """Choose a plan, and explain the choice.

    Args:
        asked: the question.
        explain: whether to find alternatives and remedies, as :func:`explained` does.

    Raises:
        InputError: the fixed settings do not work on the machine.
    """
    question, notes = asked.question()
    if question.machine.usable_bytes is None or not question.open:
        plan, said = _as_it_stands(question, notes)
    else:
        plan, said = _chosen(question, notes)
    said = (*said, *host_notes(plan), *length_notes(plan.run.train, plan.batch.tokens, asked.named), *_package(plan))
    given = Answer(asked, question, plan, said)
    return explained(given) if explain else given


def explained(given: Answer) -> Answer:
    """Add the alternatives to the answer, or the remedies if no plan fits. Each of them takes another search."""
    question, plan = given.question, given.choice
    if question.machine.usable_bytes is None:
        return given
    if not plan.can_train:
        return replace(given, remedies=tuple(remedies(question)))
    return replace(given, alternatives=tuple(alternatives(question, plan)) if question.open else ())


def _package(plan: Plan) -> Iterator[str]:
    """At most one remark: to install DeepSpeed, if the plan needs it and it is not installed here."""
    if not is_installed(plan.run.parallel.spec):
        why = "the command needs DeepSpeed" if IN_BROWSER else "DeepSpeed is not installed here"
        yield f"{why}; run {INSTALL} before the command"


def _as_it_stands(question: Question, notes: tuple[str, ...]) -> tuple[Plan, tuple[str, ...]]:
    """The plan for the run's own settings, without a search, and ``notes`` with further remarks."""
    run, machine = question.run, question.machine
    batch = plan_batches(run, machine.ranks, micro_fixed="micro_batch" not in question.open)
    plan, gave_way = fixed_in_room(question, batch)
    notes = (*notes, *gave_way)
    if batch.micro_batch < run.train.micro_batch:
        notes = (
            f"micro batch {batch.micro_batch} rather than {run.train.micro_batch}: it divides the tokens of a step",
            *notes,
        )
    if plan.fits and plan.total_bytes > question.limit:
        notes = (*notes, f"less than the safety margin of {question.margin:.0%} is left")
    return plan, notes


def _chosen(question: Question, notes: tuple[str, ...]) -> tuple[Plan, tuple[str, ...]]:
    """The plan that the search finds, and ``notes`` with further remarks.

    If no plan fits with the safety margin, the search is repeated without the margin.
    """
    roomed = choose_in_room(question)
    if roomed.found.best is None and question.margin:
        tight = choose_in_room(replace(question, margin=0.0))
        if tight.found.best is not None:
            said = f"it fits only without the safety margin of {question.margin:.0%}"
            return tight.found.best, (*notes, *tight.notes, said)
    plan = roomed.found.best or roomed.found.closest
    assert plan is not None
    notes = (*notes, *roomed.notes)
    used, there = plan.machine.ranks, question.machine.ranks
    if used < there:
        notes = (*notes, f"{used} of the {there} GPUs: with more GPUs, communication costs more time than they save")
    return plan, notes
