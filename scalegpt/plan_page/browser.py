"""Answers the page that plans in the browser. :func:`parts` takes the form's values as JSON and returns HTML as JSON.

The page's JavaScript only passes text between the form and this module. The module plans as ``scalegpt plan`` does.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from scalegpt.config.aliases import hint
from scalegpt.config.machine import CPU, MachineConfig
from scalegpt.config.run import SECTIONS
from scalegpt.errors import InputError
from scalegpt.html.page import escape
from scalegpt.plan_page import page, wording
from scalegpt.plan_page.curves import over_micro_batches
from scalegpt.plan_page.region import what_fits
from scalegpt.plan_page.scaling import over_gpus
from scalegpt.planner.query import Answer, Asked, answer, explained
from scalegpt.planner.tables import over_counts
from scalegpt.planner.target import Target
from scalegpt.structured import CONFIG_LIMIT, parse_json
from scalegpt.text import shown
from scalegpt.units import GB, gib

PARTS = ("summary", "command", "memory", "time", "scaling", "region", "curves", "alternatives", "details")
"""The parts of the answer, in the order of the page; each is the id of an element that holds it."""

_WHERE = "page"
_MACHINE = frozenset(MachineConfig.settings())
_RUN = frozenset(key for section in SECTIONS.values() for key in section.settings())
_HF, _NAME = "hf", "hf_name"
"""The keys, in a request, of the text of a Hugging Face ``config.json`` and of the model's name."""

KNOWN = frozenset({"preset", _HF, _NAME}) | _MACHINE | _RUN
"""The keys of a request."""


def parts(request: str) -> Iterator[str]:
    """Answer one request, part by part. The quick parts come first, so that a newer request can end the work early.

    Args:
        request: JSON: an object of texts. It has ``preset``, or ``hf`` (the text of a Hugging Face ``config.json``) and
            ``hf_name`` (the model's name), or neither; and settings of a run and of a machine, as ``scalegpt plan`` takes
            them. Empty texts count as not given.

    Yields:
        JSON objects, or an empty text while a part takes longer. ``html`` maps some of :data:`PARTS` to their HTML. The
        first object also has ``title``; ``status``, a sentence; and ``used``, a map from each setting to the plan's
        value. Another object has ``json``, which is what ``scalegpt plan --json`` prints. If the request cannot be
        answered, the only object has ``error``, one line, and ``field``, the key that it is about, or null.
    """
    try:
        values = {key: str(value) for key, value in parse_json(request, _WHERE).items() if str(value).strip()}
        given = answer(ask(values), explain=False)
        yield json.dumps(_first(given, values))
        yield json.dumps(_explained(given))
        yield from _varied(given)
    except InputError as error:
        yield json.dumps(_refusal(str(error)))


def ask(values: Mapping[str, str]) -> Asked:
    """The question that a request asks; see :func:`parts`.

    Raises:
        InputError: a key or a value is not allowed, or no card is given.
    """
    unknown = next((key for key in values if key not in KNOWN), None)
    if unknown is not None:
        raise InputError(f"unknown setting {shown(unknown)}{hint(unknown, KNOWN)}")
    if values.get("gpu", "").strip().lower() == CPU:
        raise InputError(
            "gpu cpu means the processor of the machine that plans, which this page cannot see; choose a GPU"
        )
    if not values.keys() & {"gpu", "memory_gb"}:
        raise InputError("gpu is not chosen; choose a card, or give memory_gb, the memory of a card in GB")
    target = Target.of({key: values[key] for key in values if key in _MACHINE}, _WHERE, calibrated=False)
    if _HF not in values:
        return _asked(values, target, None)
    if len(values[_HF]) > CONFIG_LIMIT:
        raise InputError(
            f"config.json has more than {CONFIG_LIMIT:,} characters; choose the file that describes the model"
        )
    with TemporaryDirectory() as root:
        file = Path(root) / _folder(values) / "config.json"
        file.parent.mkdir()
        file.write_text(values[_HF], encoding="utf-8", errors="replace")
        try:
            return _asked(values, target, str(file))
        except InputError as error:
            raise InputError(str(error).replace(f"{file.parent}/", "").replace(f"--hf {root}/", "--hf ")) from None


def _folder(values: Mapping[str, str]) -> str:
    """The name of the model's folder: ``hf_name`` as a name that any file system takes."""
    return re.sub(r"[^\w.+-]", "_", values.get(_NAME, ""))[:100].strip(".") or "model"


def _asked(values: Mapping[str, str], target: Target, hf: str | None) -> Asked:
    return Asked.of(
        preset=values.get("preset"),
        config_file=None,
        hf=hf,
        flags={key: value for key, value in values.items() if key in _RUN},
        machine=target.machine,
        calibration=target.calibration,
        margin=target.margin,
        given_in=_WHERE,
    )


# --- the parts -------------------------------------------------------------------------------------------------------


def _first(given: Answer, values: Mapping[str, str]) -> dict[str, Any]:
    plan = given.choice
    html = {
        "summary": f"<h2>{escape(_title(given))}</h2>{_figures(given)}{page.verdict(given)}",
        "memory": page.memory_section(given),
        "time": page.time_section(plan) if plan.machine.card is not None else "",
        "details": page.settings_section(given)
        + page.phases_section(plan, None)
        + page.notes_section(given, _command(values), None),
    }
    if plan.can_train:
        html["command"] = page.command_section(given)
    return {
        "html": html,
        "title": _title(given),
        "status": f"{_title(given)}: {'it fits' if plan.can_train else 'it does not fit'}.",
        "used": _used(given),
    }


def _explained(given: Answer) -> dict[str, Any]:
    whole = explained(given)
    html = {"alternatives": page.alternatives_section(whole) if whole.choice.can_train else ""}
    if not whole.choice.can_train:
        html["command"] = page.remedies_section(whole)
    return {"html": html, "json": whole.as_dict()}


def _varied(given: Answer) -> Iterator[str]:
    """The parts that vary the plan, with empty texts between the rows of the table over GPUs."""
    rows = []
    if given.choice.machine.card is not None:
        for row in over_counts(given.asked):
            rows.append(row)
            yield ""
    yield json.dumps({"html": {"scaling": over_gpus(given, rows) if rows else ""}})
    yield json.dumps({"html": {"region": what_fits(given)}})
    yield json.dumps({"html": {"curves": over_micro_batches(given)}})


def _title(given: Answer) -> str:
    return f"{given.choice.run.name} on {wording.cards(given.choice.machine)}"


def _figures(given: Answer) -> str:
    """The plan's main figures, as a list of names, values and remarks."""
    plan = given.choice
    usable = plan.machine.usable_bytes or 0
    shown = [("Memory on each GPU", gib(plan.total_bytes), f"of {gib(usable)}, {plan.total_bytes / usable:.0%}")]
    if plan.machine.card is not None and plan.can_train:
        tokens, time = wording.whole_run(plan)
        shown += [
            ("Tokens per second", f"{plan.tokens_per_second:,.0f}", f"likely {wording.likely(plan)}"),
            ("Whole run", time, f"for {tokens}"),
            ("MFU", f"{plan.mfu:.0%}", f"a step takes {wording.duration(plan.seconds)}"),
        ]
    cells = (
        f"<div><dt>{name}</dt><dd><b>{value}</b> <span>{remark}</span></dd></div>" for name, value, remark in shown
    )
    return f'<dl class="figures">{"".join(cells)}</dl>'


def _used(given: Answer) -> dict[str, str]:
    """Map each setting to the plan's value, as text. The form shows it in fields that the user leaves empty."""
    plan, machine = given.choice, given.question.machine
    used = {key: value for section in SECTIONS for key, value in asdict(getattr(plan.run, section)).items()}
    used |= {"zero_stage": plan.run.parallel.stage, "tokens_per_step": plan.batch.tokens}
    used["shard_size"] = plan.run.parallel.shard_size or "none"
    used |= {"gpus": machine.gpus, "nodes": machine.nodes, "margin": given.question.margin}
    used["host_memory_gb"] = None if machine.host_bytes is None else round(machine.host_bytes / GB)
    return {
        key: str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
        for key, value in used.items()
        if isinstance(value, str | int | float)
    }


def _command(values: Mapping[str, str]) -> str:
    """The command that makes the same plan in a terminal."""
    flags = {**values, _HF: f"{_folder(values)}/config.json"} if _HF in values else dict(values)
    flags.pop(_NAME, None)
    return shlex.join(["scalegpt", "plan", *(word for key, value in flags.items() for word in (f"--{key}", value))])


def _refusal(message: str) -> dict[str, Any]:
    """An error as the page shows it: the message, and the key with which the message begins."""
    message = message.removeprefix(f"{_WHERE}: ")
    words = re.findall(r"[a-z0-9_]+", re.sub(r"'[^']*'", "", message))
    field = next((word for word in words if word in KNOWN), None)
    if message.startswith("config.json"):
        field = _HF
    return {"error": message, "field": None if message.startswith("unknown setting") else field}
