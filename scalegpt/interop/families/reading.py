"""Reads the shape of a model from Hugging Face's ``config.json``."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalegpt.config.settings import coerce
from scalegpt.config.shape import RESOLVED, ModelConfig
from scalegpt.config.tokenizer import TOKENIZER_JSON, TOKENS
from scalegpt.errors import InputError
from scalegpt.interop.families.rope import read_rope
from scalegpt.interop.families.table import FAMILIES, UNSUPPORTED, Family
from scalegpt.structured import read_object
from scalegpt.text import shown

CONFIG = "config.json"

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class HfModel:
    """A model that a ``config.json`` describes.

    Attributes:
        path: the ``config.json``.
        family: the ``model_type``, a key of :data:`~scalegpt.interop.families.table.FAMILIES`.
        model: its shape.
        positions: the context length that the file states, in tokens.
        window: how many tokens attention looks back, if fewer than ``positions``; ``block_size`` must not exceed it.
        dtype: the dtype of the weights, for example ``bfloat16``; None: the file does not say it.
        bos, pad: ids of the tokens that begin and pad a text; None: there is none.
        eos: ids of the tokens that end a text.
        notes: remarks for the user, a line each, on values that ScaleGPT uses differently.
    """

    path: Path
    family: str
    model: ModelConfig
    positions: int
    window: int | None = None
    dtype: str | None = None
    bos: int | None = None
    pad: int | None = None
    eos: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the folder that holds the file."""
        return self.path.resolve().parent.name


def is_hugging_face(path: Path) -> bool:
    """Whether a path is a folder with a Hugging Face model, of any family."""
    return (path / CONFIG).is_file()


def tokenizer_setting(read: HfModel) -> str | None:
    """The setting ``tokenizer`` for a model: its folder, if that has a ``tokenizer.json``, else None.

    A GPT-2 model with GPT-2's vocabulary and without that file has the tokenizer ``gpt2``.
    """
    folder = read.path.parent
    if (folder / TOKENIZER_JSON).exists():
        return str(folder)
    return "gpt2" if read.family == "gpt2" and read.model.vocab_size >= TOKENS["gpt2"] else None


def read_config(path: Path, block_size: int | None = None) -> HfModel:
    """Read the configuration of a Hugging Face model.

    Args:
        path: a folder with a ``config.json``, or that file.
        block_size: the context length with which to use the model; None: the file's, or the attention window if it is
            shorter.

    Raises:
        InputError: there is no such file, or ScaleGPT cannot express the model; the message says what is not supported.
    """
    file, config = _load(path)
    try:
        return _model(file, _family(config), config, block_size)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _load(path: Path) -> tuple[Path, dict[str, Any]]:
    file = path / CONFIG if path.is_dir() else path
    try:
        return file, read_object(file)
    except FileNotFoundError:
        if not path.is_dir():
            raise InputError(
                f"{path} does not exist; give a folder with a Hugging Face model, or its {CONFIG} (nothing is downloaded)"
            ) from None
        adapter = (path / "adapter_config.json").exists()
        what = (
            "it is an adapter without its model: merge both first" if adapter else f"no Hugging Face model: no {CONFIG}"
        )
        raise InputError(f"{path} holds {what}") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None


def _family(config: Mapping[str, Any]) -> Family:
    """The family of a configuration. Refuses a model that no supported family has."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise InputError("no Hugging Face model: model_type is missing")
    if config.get("auto_map"):
        raise InputError("the model needs code of its own (auto_map, trust_remote_code), which is not run")
    if kind not in FAMILIES:
        experts = any(isinstance(config.get(key), int) and config[key] > 1 for key in _EXPERTS)
        why = UNSUPPORTED.get(kind, "it is a mixture of experts" if experts else "")
        raise InputError(
            f"model_type {shown(kind)} is not supported{why and ': ' + why}; supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    named = config.get("architectures") or [family.architecture]
    base = family.architecture.removesuffix("LMHeadModel").removesuffix("ForCausalLM") + "Model"
    if not isinstance(named, list) or not {family.architecture, base} & set(map(str, named)):
        raise InputError(f"architectures {shown(named)} is not supported, only {family.architecture}")
    if config.get("quantization_config"):
        raise InputError("its weights are quantised (quantization_config); give the model in bf16, fp16 or fp32")
    if config.get("pruned_heads"):
        raise InputError("pruned_heads are not supported")
    return family


def _model(file: Path, family: Family, given: Mapping[str, Any], block_size: int | None) -> HfModel:
    config = {**family.defaults, **given}
    for key, value in family.must.items():
        if config[key] != value:
            raise InputError(f"{key} {shown(config[key])} is not supported in {family.name}, only {str(value).lower()}")
    missing = [key for key in family.keys.values() if key not in config]
    if missing:
        raise InputError(f"{missing[0]} is missing, which {family.name} needs")
    values = {ours: config[theirs] for ours, theirs in family.keys.items()}
    values |= {**family.always, "activation": _activation(family, config), **_bias(family, config)}
    dropout, notes = _dropout(family, config)
    values["dropout"] = dropout
    if family.theta is not None:
        rotates = _rotates(family, config)
        values |= {"position": "rope", **read_rope(family, config)} if rotates else {"position": "none"}
    model = _checked(family, values)
    window = _window(family, config, model.n_layer)
    positions = model.block_size
    if window is not None and window < positions and block_size is None:
        notes = (
            *notes,
            f"attention looks back {window:,} tokens, so block_size is {window:,} rather than {positions:,}",
        )
    model = model.changed(block_size=_block(family, model, window, block_size))
    return HfModel(
        path=file,
        family=family.name,
        model=model,
        positions=positions,
        window=window if window is not None and window < positions else None,
        dtype=_dtype(config),
        bos=_ids(config, "bos_token_id")[0],
        pad=_ids(config, "pad_token_id")[0],
        eos=tuple(each for each in _ids(config, "eos_token_id") if each is not None),
        notes=notes,
    )


def _checked(family: Family, values: Mapping[str, Any]) -> ModelConfig:
    """The shape. Sizes that equal the default are set to none, as in a preset.

    An error about a setting also names the file's key.
    """
    try:
        fields = ModelConfig.settings()
        model = ModelConfig(**{key: coerce(fields[key], value) for key, value in values.items()})
        for key, size in RESOLVED.items():
            if model.n_embd % model.n_head == 0 or key != "head_size":
                default = model.changed(**{key: None})
                model = default if getattr(default, size) == getattr(model, size) else model
        return model
    except InputError as error:
        theirs = family.keys.get(str(error).split(" ", 1)[0])
        raise InputError(f"{error}; in this file the setting is called {theirs}" if theirs else str(error)) from None


def _activation(family: Family, config: Mapping[str, Any]) -> str:
    named = config[family.activation_key]
    if not isinstance(named, str) or named not in family.activations:
        known = ", ".join(family.activations)
        raise InputError(f"{family.activation_key} {shown(named)} is not supported in {family.name}, only {known}")
    return family.activations[named]


def _bias(family: Family, config: Mapping[str, Any]) -> dict[str, bool]:
    switches = {key: bool(config[key]) for key in family.bias_keys}
    if len(set(switches.values())) > 1:
        said = ", ".join(f"{key} {str(value).lower()}" for key, value in switches.items())
        raise InputError(f"{said} is not supported; both must be true, or both false")
    return {"bias": next(iter(switches.values()))} if switches else {}


def _dropout(family: Family, config: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """The dropout of the model.

    If the file's dropouts differ, ScaleGPT's single setting cannot express them, so it is 0.
    """
    given = {key: config.get(key) for key in family.dropouts or ("attention_dropout",)}
    rates = list(given.values())
    if family.dropouts and all(rate == rates[0] for rate in rates):
        return rates[0], ()
    if not any(rates):
        return 0.0, ()
    said = ", ".join(f"{key} {shown(rate)}" for key, rate in given.items())
    return 0.0, (f"{said} is not used; --dropout sets one rate for all",)


def _rotates(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether the layers have rotary positions. Refuses models in which only some do."""
    if family.rope_layers is None:
        return True
    layers = config.get(family.rope_layers)
    if layers is None:
        interval, count = _number(config, "no_rope_layer_interval"), _number(config, family.keys["n_layer"])
        layers = [bool((layer + 1) % interval) for layer in range(min(count, interval))] if interval else []
    if not isinstance(layers, list) or not layers or len({bool(each) for each in layers}) > 1:
        raise InputError(
            f"{family.name} with rotary positions in only some of its layers ({family.rope_layers}) is not supported; all "
            "layers must have them, or none"
        )
    return bool(layers[0])


def _window(family: Family, config: Mapping[str, Any], layers: int) -> int | None:
    """How many tokens attention looks back in layers with a window; None: no layer has a window."""
    kinds = config.get("layer_types")
    if kinds is not None and not isinstance(kinds, list):
        raise InputError(f"layer_types must be a list, not {shown(kinds)}")
    other = [each for each in kinds or () if each not in (_FULL, _SLIDING)]
    if other:
        raise InputError(f"layer_types with {shown(other[0])} are not supported, only {_FULL}")
    if family.window is None or (family.window_switch is not None and not config[family.window_switch]):
        return None
    if family.window_switch is not None:
        slides = _SLIDING in kinds if kinds is not None else _number(config, "max_window_layers") < layers
        if not slides:
            return None
    return None if config[family.window] is None else _number(config, family.window)


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(f"{key} must be a whole number, not {shown(value)}")
    return value


def _block(family: Family, model: ModelConfig, window: int | None, wanted: int | None) -> int:
    """The context length to use. Refuses one beyond the window, or beyond the learned positions."""
    if wanted is None:
        return model.block_size if window is None else min(window, model.block_size)
    if window is not None and wanted > window:
        raise InputError(
            f"{family.window} {window:,} is shorter than block_size {wanted:,}, which is not supported; "
            f"give --block_size {window} or less"
        )
    if model.position == "learned" and wanted > model.block_size:
        raise InputError(f"the model has {model.block_size:,} positions; give --block_size {model.block_size} or less")
    return wanted


def _dtype(config: Mapping[str, Any]) -> str | None:
    named = config.get("dtype", config.get("torch_dtype"))
    return named.removeprefix("torch.") if isinstance(named, str) else None


def _ids(config: Mapping[str, Any], key: str) -> list[int | None]:
    """The ids of a special token, of which some models have several; a single None if there is none."""
    given = config.get(key)
    ids = given if isinstance(given, list) else [given]
    if any(each is not None and (not isinstance(each, int) or isinstance(each, bool)) for each in ids):
        raise InputError(f"{key} must be a whole number or a list of them, not {shown(given)}")
    return [each for each in ids if each is None or each >= 0] or [None]
