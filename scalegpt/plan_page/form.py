"""Writes the page that plans in the browser: its form, and the places for the parts of the answer."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from scalegpt.architecture.counting import count_parameters
from scalegpt.config.machine import MachineConfig
from scalegpt.config.presets import preset_names, public_names, resolve
from scalegpt.config.run import AUTO, PLANNED, SECTIONS
from scalegpt.config.settings import field_types, limits
from scalegpt.config.shape import ModelConfig
from scalegpt.hardware.gpus import catalogue
from scalegpt.html.page import STYLE as PAGE_STYLE
from scalegpt.html.page import escape
from scalegpt.plan_page.browser import PARTS, parts
from scalegpt.plan_page.page import STYLE as PLAN_STYLE
from scalegpt.units import human_count

STYLE = PAGE_STYLE + PLAN_STYLE
"""The CSS that the page shares with ``scalegpt plan --html``."""

FIRST = {"preset": "Llama-3.2-1B", "gpu": "H100 SXM", "gpus": "8"}
"""What the form holds when the page is opened without a plan in its address."""

POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; connect-src 'self'; style-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'"
)
"""The page's Content-Security-Policy: nothing is loaded from elsewhere, and nothing is sent."""

_MACHINE = {"gpus": "GPUs in each machine", "nodes": "Machines"}
_MORE_MACHINE = {
    "memory_gb": "Memory of a card, GB", "host_memory_gb": "Host memory, GB", "network": "Network, e.g. 8xinfiniband-400g",
    "network_gbps": "Network, Gbit/s",
    "margin": "Safety margin",
}  # fmt: skip
_TRAINING = {
    "max_tokens": "Tokens of the run", "tokens_per_step": "Tokens per step", "precision": "Precision",
    "optimizer": "Optimizer",
}  # fmt: skip
_FIXED = {
    "backend": "Backend", "zero_stage": "ZeRO stage", "offload": "Offload", "shard_size": "Shard size",
    "micro_batch": "Micro batch",
    "recompute": "Recompute", "loss": "Loss", "packing": "Packing", "attention": "Attention kernel", "compile": "Compile",
    "residual_dtype": "Residual dtype",
}  # fmt: skip
_SHAPE = {name: name for name in ModelConfig.settings()}
_FIELDS = MachineConfig.settings() | {
    name: field for section in SECTIONS.values() for name, field in section.settings().items()
}
_MOST_CHOICES = 8


def index() -> str:
    """The page as HTML. It contains the answer to :data:`FIRST`, so that it shows a plan while Python starts."""
    html, title = _answered(FIRST)
    places = "".join(
        f'<section id="{part}" class="part">{html.get(part, "")}</section>' + _AFTER.get(part, "") for part in PARTS
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        '<meta name="description" content="Whether a language model fits your GPUs, how fast it trains, and the command.">'
        f"<title>{escape(title)} · ScaleGPT</title>"
        '<link rel="icon" href="icon.svg" type="image/svg+xml"><link rel="stylesheet" href="site.css">'
        '<script type="module" src="main.mjs"></script></head><body>'
        "<header><h1>ScaleGPT planner</h1><p>The fastest way to train a language model on your GPUs that fits their memory. "
        "It is computed in this page: nothing is sent anywhere.</p>"
        "<noscript><p>This page plans with JavaScript and WebAssembly, which are turned off.</p></noscript></header>"
        f'<div class="columns">{_form()}<main><div class="toolbar"><p id="status" role="status">Starting the planner …</p>'
        '<span><button type="button" id="copy-link">Copy link</button> '
        '<button type="button" id="save" disabled>Save as JSON</button></span></div>'
        f'<p id="error" role="alert" hidden></p>{places}</main></div></body></html>\n'
    )


_AFTER = {"command": '<p class="after"><button type="button" id="copy-command">Copy command</button></p>'}
"""The name of a part → the HTML below it, which stays when the part is replaced."""


def _answered(values: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """The HTML of all parts of the answer to a request, and its title."""
    html: dict[str, str] = {}
    title = ""
    for part in filter(None, parts(json.dumps(values))):
        given = json.loads(part)
        html |= given["html"]
        title = given.get("title", title)
    return html, title


def _form() -> str:
    groups = {
        "Model": _presets() + _FILE + _more("Shape", _SHAPE),
        "Machine": _cards() + _pair(_MACHINE) + _more("Memory and network", _MORE_MACHINE),
        "Training": _pair(_TRAINING) + _more("Fix what the planner chooses", _FIXED),
    }
    return (
        '<form id="form" aria-label="What to plan" autocomplete="off">'
        + "".join(f"<fieldset><legend>{title}</legend>{fields}</fieldset>" for title, fields in groups.items())
        + '<p id="others" hidden="hidden"></p><p><button type="reset">Start over</button></p></form>'
    )


_FILE = (
    '<div class="field"><label for="f-hf">or a Hugging Face config.json</label>'
    '<div id="drop"><input type="file" id="f-hf" accept=".json,application/json" aria-describedby="e-hf"/>'
    '<p id="file" hidden="hidden"></p></div><p class="problem" id="e-hf"></p></div>'
)


def _field(name: str, label: str, control: str) -> str:
    problem = f'<p class="problem" id="e-{name}"></p>'
    return f'<div class="field"><label for="f-{name}">{escape(label)}</label>{control}{problem}</div>'


def _attributes(name: str, help: str) -> str:
    return f'id="f-{name}" name="{name}" title="{escape(help)}" aria-describedby="e-{name}"'


def _presets() -> str:
    def group(label: str, names: Iterable[str]) -> str:
        sizes = {name: count_parameters(resolve(preset=name).model).total for name in names}
        options = (
            _option(name, f"{name} · {human_count(sizes[name])}", FIRST["preset"])
            for name in sorted(sizes, key=sizes.__getitem__)
        )
        return f'<optgroup label="{label}">{"".join(options)}</optgroup>'

    own, public = group("ScaleGPT", preset_names()), group("Public models", public_names())
    options = _option("", "none: the shape below") + public + own
    help = "a named configuration: model, batch and schedule"
    return _field("preset", "Preset", f"<select {_attributes('preset', help)}>{options}</select>")


def _cards() -> str:
    known = (
        f'<option value="{escape(card.name)}">{card.gb} GB, {card.tflops:g} TFLOP/s</option>' for card in catalogue()
    )
    control = (
        f'<input {_attributes("gpu", "a card of the catalogue, or a part of its name")} list="cards" value="{FIRST["gpu"]}" '
        f'type="search" placeholder="for example H100 or 4090"/><datalist id="cards">{"".join(known)}</datalist>'
    )
    return _field("gpu", "Card", control)


def _more(title: str, fields: Mapping[str, str]) -> str:
    return f"<details><summary>{title}</summary>{_pair(fields)}</details>"


def _pair(fields: Mapping[str, str]) -> str:
    """Fields in two columns."""
    return f'<div class="pair">{"".join(_setting(name, label) for name, label in fields.items())}</div>'


def _setting(name: str, label: str) -> str:
    """The field of a setting: a choice if it has few values, else a text."""
    field = _FIELDS[name]
    help = f"{field.metadata['help']}{f' ({limits(field)})' if limits(field) else ''}"
    choices = _choices(field)
    if choices:
        options = _option("", AUTO if name in PLANNED else "default") + "".join(_option(each, each) for each in choices)
        return _field(name, label, f"<select {_attributes(name, help)}>{options}</select>")
    numeric = ' inputmode="decimal"' if int in field_types(field) or float in field_types(field) else ""
    value = f' value="{FIRST[name]}"' if name in FIRST else ""
    return _field(name, label, f"<input {_attributes(name, help)}{numeric}{value}/>")


def _choices(field: "dataclasses.Field[Any]") -> tuple[str, ...]:
    low, high = field.metadata["minimum"], field.metadata["maximum"]
    if int in field_types(field) and None not in (low, high) and high - low < _MOST_CHOICES:
        return tuple(map(str, range(low, high + 1)))
    booleans = ("true", "false") if bool in field_types(field) else ()
    return (*booleans, *field.metadata["choices"])


def _option(value: str, text: str, chosen: str | None = None) -> str:
    selected = ' selected="selected"' if value == chosen else ""
    return f'<option value="{escape(value)}"{selected}>{escape(text)}</option>'
