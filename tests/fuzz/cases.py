"""The cases: each follows from a seed and its number, so that a failed one can be run again alone."""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz import values
from fuzz.material import CATALOGUE, CONFIG, SHAPE, TRAINING, as_yaml, flags
from scalegpt.cli.sample import SampleSettings
from scalegpt.config.inference import EvaluationSettings
from scalegpt.config.machine import MachineConfig
from scalegpt.config.run import READING, SECTIONS

SETTINGS = sorted({key for section in SECTIONS.values() for key in section.settings()})
FIELDS = {
    key: field
    for section in (*SECTIONS.values(), MachineConfig, SampleSettings, EvaluationSettings)
    for key, field in section.settings().items()
}
MODEL = sorted(SECTIONS["model"].settings())
ENDLESS = {"max_minutes", "sample_tokens", "compile", "step_timeout", "first_step_timeout"}
"""Settings that may make a training run take very long, or end its process on a busy machine."""

OTHERS = ("llmc", "meg", "trove")
"""Folders of token files of other programs."""


@dataclass
class Case:
    """A command, and what it may do.

    Attributes:
        words: the command line.
        environment: variables, which replace those of the process.
        writes: flags or words before paths that the command may write.
        may_fail: whether exit status 1 may be right: a run that fails, a damaged checkpoint that is found.
        speaks_raw: whether standard output is a model's text, which a pipe gets as it is.
    """

    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    writes: tuple[str, ...] = ()
    may_fail: bool = False
    speaks_raw: bool = False


def draw(seed: int, number: int) -> Case:
    """The case of a number; its files are damaged in the current folder, which holds :mod:`fuzz.material`.

    Args:
        seed: of all cases.
        number: of this one.
    """
    rng = random.Random(f"{seed}:{number}")
    case: Case = _kind(rng)(rng)
    if rng.random() < 0.1:
        case.words.append("--debug")
    return case


def _kind(rng: random.Random) -> Callable[[random.Random], Case]:
    kinds, weights = zip(*KINDS, strict=True)
    kind: Callable[[random.Random], Case] = rng.choices(kinds, weights)[0]
    return kind


def kind_of(seed: int, number: int) -> str:
    """What a case is about: the name of its function."""
    return _kind(random.Random(f"{seed}:{number}")).__name__


def any_value(rng: random.Random) -> str:
    """A word of a command line; it may hold anything but NUL."""
    chosen = str(rng.choice(rng.choice((values.NUMBERS, values.WORDS, values.PATHS))))
    return chosen.replace("\0", "")


def edge_value(rng: random.Random, key: str) -> str:
    """A value at or near a bound of a setting, or any value for a setting without bounds."""
    bounds = FIELDS[key].metadata
    edges = [value for name in ("minimum", "maximum", "above", "below") if (value := bounds[name]) is not None]
    edges += [value for edge in edges for value in (edge + 1, edge / 2, edge // 3)]
    return (
        str(rng.choice([*edges, *bounds["choices"], FIELDS[key].default, "auto"]))
        if edges or bounds["choices"]
        else any_value(rng)
    )


def path(rng: random.Random) -> str:
    """A path, possibly a hostile one."""
    return str(rng.choice(values.PATHS))


def flag(rng: random.Random, key: str, value: str) -> list[str]:
    """A flag with its value, in one of its spellings."""
    name = f"--{key if rng.random() < 0.8 else key.replace('_', '-')}"
    return [f"{name}={value}"] if rng.random() < 0.5 else [name, value]


def some_flags(rng: random.Random, keys: list[str], most: int = 3) -> list[str]:
    """A few flags, possibly with hostile values."""
    words: list[str] = []
    for _ in range(rng.randint(1, most)):
        key = rng.choice(keys)
        words += flag(rng, key, edge_value(rng, key) if key in FIELDS and rng.random() < 0.6 else any_value(rng))
    return words


# --- command lines -----------------------------------------------------------------------------------------------------


def plan_line(rng: random.Random) -> Case:
    keys = [*SETTINGS, *MachineConfig.settings(), *MachineConfig.settings()]
    words = [
        "plan",
        *rng.choice((["--preset", "tiny"], ["--gpu", "4090", "--preset", "tiny"], ["--gpu", "t4"], flags(**SHAPE))),
    ]
    words += some_flags(rng, keys)
    if rng.random() < 0.15:
        words += flag(rng, "html", rng.choice((path(rng), "out.html")))
    return Case(_shaken(rng, words), writes=("--html",))


def params_line(rng: random.Random) -> Case:
    words = ["params", *some_flags(rng, [*MODEL, "preset", "config_file"])]
    return Case(_shaken(rng, words + rng.choice(([], ["--show_formula"], ["--json"], ["--untied"]))))


def list_line(rng: random.Random) -> Case:
    word = rng.choice(("gpus", "presets"))
    return Case(_shaken(rng, [word, *(any_value(rng) for _ in range(rng.randint(0, 2)))]))


def data_line(rng: random.Random) -> Case:
    if rng.random() < 0.4:
        return Case(_shaken(rng, ["data", "inspect", path(rng)]))
    if rng.random() < 0.3:
        return Case(_shaken(rng, ["data", "ledger", path(rng), "--steps", any_value(rng)]))
    words = ["data", "prepare", rng.choice(("text.txt", path(rng))), *flag(rng, "out", rng.choice(("out", path(rng))))]
    words += ["--tokenizer", "byte"] if rng.random() < 0.7 else []
    words += some_flags(rng, ["tokenizer", "val_fraction", *READING], 1) if rng.random() < 0.7 else []
    return Case(_shaken(rng, words), writes=("--out",))


def checkpoint_line(rng: random.Random) -> Case:
    action = rng.choice(("list", "verify", "show", "convert"))
    words = ["checkpoint", action, rng.choice(("runs/tiny", path(rng)))]
    if action == "convert":
        words += flag(rng, "out", rng.choice(("out.safetensors", path(rng)))) + some_flags(rng, ["dtype"], 1)
    return Case(_shaken(rng, words), writes=("--out",), may_fail=action == "verify")


def sample_line(rng: random.Random) -> Case:
    keys = [key for key in SampleSettings.settings() if key not in {"num_samples", "max_new_tokens"}]
    words = [
        "sample",
        rng.choice(("runs/tiny", path(rng))),
        "--max_new_tokens",
        "3",
        *some_flags(rng, [*keys, "prompt", "prompt_file", "prompts_file", "stop"]),
    ]
    return Case(_shaken(rng, words), speaks_raw=True)


def eval_line(rng: random.Random) -> Case:
    keys = [*EvaluationSettings.settings(), "split", *READING, "input_file"]
    words = ["eval", rng.choice(("runs/tiny", path(rng)))]
    words += flag(rng, "input_file", rng.choice(("text.txt", "prep", path(rng)))) if rng.random() < 0.7 else []
    return Case(_shaken(rng, [*words, *some_flags(rng, keys, 2)]))


def train_line(rng: random.Random, more: list[str] | None = None) -> Case:
    keys = [key for key in SETTINGS if key not in ENDLESS]
    settings = {**SHAPE, **TRAINING, "max_iters": rng.choice((0, 1, 4)), "max_minutes": 0.02}
    words = ["train", *(f"--{key}={value}" for key, value in settings.items())]
    words += ["--input_file", "prep", "--model_name", rng.choice(("tiny", "new"))]
    words += (
        some_flags(rng, [*keys, "runs_dir", "model_name", "margin", "allow_change", "device"], 2)
        if more is None
        else more
    )
    return Case(_shaken(rng, words), writes=("--runs_dir",), may_fail=True)


def unknown_line(rng: random.Random) -> Case:
    words = [any_value(rng) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.5:
        words.insert(0, rng.choice(("plan", "params", "gpus", "presets", "data", "checkpoint", "sample", "eval")))
    if rng.random() < 0.5:
        words.append(f"--{any_value(rng)}")
    return Case(words)


def _shaken(rng: random.Random, words: list[str]) -> list[str]:
    """The words, sometimes with one repeated, removed or replaced."""
    if rng.random() < 0.12:
        place = rng.randrange(len(words))
        words = [*words[:place], *rng.choice(([], [any_value(rng)], [words[place]] * 2)), *words[place + 1 :]]
    if words and words[0] not in {"train", "sample"} and rng.random() < 0.2:
        words.append("--json")
    return words


# --- files ---------------------------------------------------------------------------------------------------------------


def configuration(rng: random.Random) -> Case:
    name = rng.choice(("conf.json", "conf.yaml", "conf.yml", "conf"))
    changed = values.replaced(rng, values.replaced(rng, CONFIG) if rng.random() < 0.2 else CONFIG)
    content = values.json_of(rng, changed) if name.endswith("json") else values.yaml_of(rng, changed)
    file = Path(name)
    file.write_bytes(values.damaged_text(rng, content) if rng.random() < 0.25 else content)
    if rng.random() < 0.06:
        values.damage_file(rng, file)
    commands = (
        ["params"],
        ["params", "--show_formula"],
        ["plan", "--gpu", "4090"],
        ["plan"],
        ["plan", "--memory_gb", "12", "--json"],
    )
    if rng.random() < 0.07:
        return train_line(rng, ["--config_file", name])
    return Case([*rng.choice(commands), "--config_file", name])


def deepspeed_file(rng: random.Random) -> Case:
    values.damage_file(rng, Path("ds.json"))
    words = [
        "plan",
        "--preset",
        "tiny",
        "--backend",
        "deepspeed",
        "--zero_stage",
        "1",
        "--ds_config",
        "ds.json",
        "--gpu",
        "4090",
    ]
    return Case(words + (["--gpus", "2"] if rng.random() < 0.5 else []))


def cards(rng: random.Random) -> Case:
    import yaml

    file, changed = Path("gpus.yaml"), values.replaced(rng, yaml.safe_load(CATALOGUE))
    content = values.yaml_of(rng, changed) if rng.random() < 0.6 else values.damaged_text(rng, CATALOGUE.encode())
    file.write_bytes(content)
    if rng.random() < 0.1:
        values.damage_file(rng, file)
    commands = (
        ["gpus"],
        ["gpus", "3080ti"],
        ["gpus", "--json"],
        ["plan", "--gpu", "3080ti", "--preset", "tiny"],
        ["gpus", "4090"],
    )
    where = {"SCALEGPT_GPUS": rng.choice(("gpus.yaml", "gpus.yaml", "~/gpus.yaml", path(rng)))}
    return Case(list(rng.choice(commands)), where)


def measurements(rng: random.Random) -> Case:
    values.damage_file(rng, Path("cache/calibration.json"))
    return Case(["plan", "--gpu", "4090", "--preset", "tiny"])


def prepared(rng: random.Random) -> Case:
    folder = Path(rng.choice(("prep", "prep", "nano", *OTHERS)))
    values.damage_folder(rng, folder)
    named = ["--tokenizer", "byte"] if folder.name in OTHERS and rng.random() < 0.9 else []
    if rng.random() < 0.1:
        return train_line(rng, ["--input_file", str(folder), *named])
    return Case(["data", "inspect", str(folder), *named, *rng.choice(([], ["--json"]))])


def run_folder(rng: random.Random) -> Case:
    run = Path("runs/tiny")
    values.damage_folder(rng, rng.choice((run, run / "checkpoints")))
    if rng.random() < 0.25:
        return train_line(rng, flags(max_iters=rng.choice((4, 6)), input_file="prep"))
    target = rng.choice(
        (run, *sorted((run / "checkpoints").glob("step_*"))) if (run / "checkpoints").is_dir() else (run,)
    )
    commands = (
        ["checkpoint", "list", str(target)],
        ["checkpoint", "list", str(target), "--json"],
        ["checkpoint", "verify", str(target)],
        ["checkpoint", "show", str(target)],
        ["checkpoint", "show", str(target), "--json"],
        ["checkpoint", "convert", str(target), "--out", "out.safetensors"],
        ["data", "ledger", str(run), "--steps", rng.choice(("1", "1:4", "4", "9"))],
        ["sample", str(target), "--max_new_tokens", "2"],
        ["eval", str(target), "--input_file", "text.txt"],
    )
    words = list(rng.choice(commands))
    return Case(words, writes=("--out",), may_fail="verify" in words, speaks_raw=words[0] == "sample")


def manifest(rng: random.Random) -> Case:
    """A manifest with a changed value and a valid digest."""
    found = sorted(Path("runs/tiny/checkpoints").glob("*/checkpoint.json"))
    if not found:
        return Case(["checkpoint", "list", "runs/tiny"])
    file = found[-1]
    changed: Any = values.replaced(rng, json.loads(file.read_text(encoding="utf-8")))
    if isinstance(changed, dict):
        changed.pop("sha256", None)
        changed["sha256"] = hashlib.sha256(_canonical(changed)).hexdigest()
    file.write_bytes(_canonical(changed))
    if rng.random() < 0.2:
        return train_line(rng, flags(max_iters=6))
    commands = (
        ["checkpoint", "list"],
        ["checkpoint", "verify"],
        ["checkpoint", "show"],
        ["sample", "--max_new_tokens", "2"],
    )
    words = [*rng.choice(commands), "runs/tiny"]
    return Case(words, may_fail="verify" in words, speaks_raw="sample" in words)


def _canonical(document: object) -> bytes:
    """The bytes of a manifest, of which its digest is computed."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def text_config(rng: random.Random) -> Case:
    """A file that is not a configuration, or one with unusual YAML."""
    odd = rng.choice((
        "root:$6$salt$secret:19000:0:99999:7:::\n", "-----BEGIN KEY-----\nsecret\n", "[section]\nkey = secret\n",
        "secret", "- 1\n- 2\n", "name: 2024\npreset: [a, b]\n", "name: 2024-01-01\n",
        "train: {learning_rate: 1e-3, max_iters: 1_000, warmup_steps: 010}\n",
        "train: {on_spike: off, max_minutes: 1:30}\n", "train: {max_iters: 2024-01-01}\n", "data: {tokenizer: no}\n",
        "data: {input_file: ~/text.txt}\n", "model: {bias: ON, tie_head: N}\n", "? [a, b]\n: c\n", "<<: {a: 1}\n",
        as_yaml(CONFIG) * 2,
    ))  # fmt: skip
    Path("odd.yaml").write_text(odd)
    return Case([*rng.choice((["params"], ["plan", "--gpu", "4090"])), "--config_file", "odd.yaml"])


KINDS: tuple[tuple[Callable[[random.Random], Case], float], ...] = (
    (plan_line, 10), (params_line, 8), (list_line, 4), (data_line, 8), (checkpoint_line, 4), (sample_line, 3),
    (eval_line, 3), (train_line, 3), (unknown_line, 4), (configuration, 18), (text_config, 3), (deepspeed_file, 4),
    (cards, 8), (measurements, 2), (prepared, 8), (run_folder, 10), (manifest, 4),
)  # fmt: skip
