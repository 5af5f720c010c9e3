"""``scalegpt presets``: list the presets and the public models by size, or show how two of them differ."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from scalegpt.architecture.counting import count_parameters
from scalegpt.cli.output import aligned, show, show_json
from scalegpt.cli.parser import Parser, add_json
from scalegpt.config import RunConfig
from scalegpt.config.presets import as_file, load_preset, preset_names, public_names, resolve
from scalegpt.config.rope import RopeScaling
from scalegpt.errors import InputError

EXAMPLE = """\
scalegpt presets
scalegpt presets 150M 150M_1024"""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A preset with all defaults filled in, and its number of parameters."""

    name: str
    description: str
    parameters: int
    run: RunConfig

    @classmethod
    def load(cls, name: str) -> "Preset":
        """Read a preset and fill in its defaults.

        Raises:
            InputError: there is no preset of that name.
        """
        description = str(load_preset(name).get("description", ""))
        run = resolve(preset=name)
        return cls(name=name, description=description, parameters=count_parameters(run.model).total, run=run)

    def as_dict(self) -> dict[str, Any]:
        """The preset as plain values, including the defaults of settings that its file does not have."""
        own = {"name": self.name, "description": self.description, "parameters": self.parameters}
        own["group"] = "public" if self.name in public_names() else "own"
        return own | as_file(self.run) | {"zero_stage": self.run.parallel.stage}


def main(argv: Sequence[str]) -> int:
    """Print the list of presets, or the comparison of two presets that the arguments name."""
    parser = Parser(
        "presets", "List the presets and the public models by size, or show how two of them differ.", EXAMPLE
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="two presets to compare; none: list all")
    add_json(parser, "print JSON: a list of the presets, or the comparison")
    arguments = parser.parse(argv)
    chosen = [Preset.load(name) for name in arguments.names]
    if len(chosen) not in {0, 2}:
        raise InputError(
            f"presets compares two presets, not {len(chosen)}: name two, or none for the list; "
            f"`scalegpt params --preset {chosen[0].name}` shows one"
        )
    if chosen:
        first, second = chosen
        show_json(comparison(first, second)) if arguments.json else show(_comparison_table(first, second))
        return 0
    own, public = (
        sorted(map(Preset.load, names), key=lambda preset: (preset.parameters, preset.name))
        for names in (preset_names(), public_names())
    )
    show_json([preset.as_dict() for preset in (*own, *public)]) if arguments.json else show(_lists(own, public))
    return 0


def comparison(first: Preset, second: Preset) -> dict[str, Any]:
    """Compare two presets.

    Returns:
        ``names`` and ``parameters`` (counts) of both; ``ratio``, the second count over the first; and ``differences``:
        ``section.setting`` → the pair of values, for the settings that differ.
    """
    one, other = _settings(first), _settings(second)
    return {
        "names": [first.name, second.name],
        "parameters": [first.parameters, second.parameters],
        "ratio": second.parameters / first.parameters,
        "differences": {key: [value, other[key]] for key, value in one.items() if value != other[key]},
    }


def _settings(preset: Preset) -> dict[str, Any]:
    """``section.setting`` → value, for every setting.

    Settings of the layout have no section, as in a configuration file.
    """
    run = preset.run
    sections = {"model": run.model, "train": run.train, "data": run.data}
    settings = {f"{name}.{key}": value for name, part in sections.items() for key, value in asdict(part).items()}
    settings |= {**asdict(run.parallel), "zero_stage": run.parallel.stage}
    scaling = settings.pop("model.rope_scaling") or {}
    return settings | {f"model.rope_scaling.{key.name}": scaling.get(key.name) for key in fields(RopeScaling)}


def _comparison_table(first: Preset, second: Preset) -> str:
    difference = comparison(first, second)
    rows = [("setting", first.name, second.name)]
    rows.append(("parameters", f"{first.parameters:,}", f"{second.parameters:,}"))
    rows += [(key, _plain(one), _plain(other)) for key, (one, other) in difference["differences"].items()]
    ratio = f"{second.name} has {difference['ratio']:.3f} times the parameters of {first.name}."
    return f"{aligned(rows, right={1, 2})}\n\n{ratio} All other settings are the same."


def _lists(own: Sequence[Preset], public: Sequence[Preset]) -> str:
    notes = (
        "heads: of queries, and of keys and values where there are fewer. batch: sequences of one block per GPU in a\n"
        "forward pass. tokens/step: over all GPUs. `scalegpt presets A B` shows how two presets differ, `scalegpt params\n"
        "--preset A` the parts of one."
    )
    title = "public models, in their exact shapes"
    return f"{_list_table(own)}\n\n{title}\n\n{_list_table(public)}\n\n{notes}"


def _list_table(presets: Sequence[Preset]) -> str:
    heading = ("preset", "parameters", "layers", "width", "heads", "block", "vocab", "batch", "tokens/step", "backend")
    return aligned([(*heading, "description"), *map(_row, presets)], right=range(1, 9))


def _row(preset: Preset) -> tuple[str, ...]:
    model, train = preset.run.model, preset.run.train
    micro = f"{train.micro_batch * model.block_size:,} a GPU"
    heads = str(model.n_head) if model.kv_heads == model.n_head else f"{model.n_head}/{model.kv_heads}"
    shape = (model.n_layer, model.n_embd, heads, model.block_size, model.vocab_size, train.micro_batch)
    tokens = micro if train.tokens_per_step is None else f"{train.tokens_per_step:,}"
    return (
        preset.name,
        f"{preset.parameters:,}",
        *map(str, shape),
        tokens,
        preset.run.parallel.label(),
        preset.description,
    )


def _plain(value: Any) -> str:
    """A setting's value as in a configuration file, with commas in large whole numbers."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:,}" if isinstance(value, int) else str(value)
