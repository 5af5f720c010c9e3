"""Writes the shape of a model as the ``config.json`` of a Hugging Face family."""

from typing import Any

from scalegpt.config.shape import RESOLVED, ModelConfig
from scalegpt.errors import InputError, nearest
from scalegpt.interop.families.rope import write_rope
from scalegpt.interop.families.table import FAMILIES, Family


def families_of(model: ModelConfig) -> tuple[str, ...]:
    """The names of the families that have this shape, the most widely read first; empty if none has it."""
    return tuple(name for name, family in FAMILIES.items() if not _unmet(model, family))


def as_config(model: ModelConfig, family: str | None = None) -> dict[str, Any]:
    """The ``config.json`` of a model. It lacks the dtype of the weights, and has None for the ids of special tokens.

    Some families have biases everywhere (:attr:`Family.fills_biases`). A model without biases can be written as such a
    family too; its exported weights then need zeros for them.

    Args:
        model: the shape; its vocabulary size is known.
        family: the ``model_type`` to write; None: the first of :func:`families_of`.

    Raises:
        InputError: there is no such family, or it does not have this shape; the message says which settings it needs.
    """
    if family is not None and family not in FAMILIES:
        raise InputError(f"family {family!r} does not exist{nearest(family, FAMILIES)}")
    chosen = [FAMILIES[family]] if family is not None else list(FAMILIES.values())
    unmet = {each.name: _unmet(model, each) for each in chosen}
    name = min(unmet, key=lambda each: len(unmet[each]))
    if unmet[name]:
        needs = ", ".join(unmet[name])
        raise InputError(
            f"no Hugging Face family has this shape; the nearest is {name}, which needs {needs}"
            if family is None
            else f"{name} models do not have this shape; they need {needs}"
        )
    return _written(model, FAMILIES[name])


def _unmet(model: ModelConfig, family: Family) -> list[str]:
    """The settings that the family needs and the model does not have, for example ``norm rmsnorm``."""
    fixed = {key: value for key, value in family.always.items() if key != "bias" or not family.fills_biases}
    unmet = [f"{key} {str(value).lower()}" for key, value in fixed.items() if getattr(model, key) != value]
    whole_heads = model.head_width * model.n_head == model.n_embd
    activations = dict.fromkeys(family.activations.values())
    needs = {
        "bias true or false": not (family.bias_keys and model.bias == "qkv"),
        f"activation {' or '.join(activations)}": model.activation in activations,
        "position rope or none": family.rope_layers is None or model.position != "learned",
        f"n_kv_head {model.n_head}": "n_kv_head" in family.keys or model.kv_heads == model.n_head,
        "n_head times head_size equal to n_embd": "head_size" in family.keys or whole_heads,
        "an n_embd that n_head divides": not family.splits_width or model.n_embd % model.n_head == 0,
        "rotary_share 1": family.share is not None or model.position != "rope" or model.rotary_share == 1,
        "logit_softcap none": model.logit_softcap is None,
    }
    return unmet + [need for need, is_met in needs.items() if not is_met]


def _written(model: ModelConfig, family: Family) -> dict[str, Any]:
    # Without these keys transformers takes the ids of the family's first model, which may exceed the vocabulary.
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.name, **tokens}
    config |= {theirs: getattr(model, RESOLVED.get(ours, ours)) for ours, theirs in family.keys.items()}
    config |= family.must
    config[family.activation_key] = next(key for key, ours in family.activations.items() if ours == model.activation)
    config |= dict.fromkeys(family.bias_keys, model.bias)
    config |= dict.fromkeys(family.dropouts, model.dropout)
    config |= write_rope(family, model)
    if family.rope_layers is not None:
        config[family.rope_layers] = [int(model.position == "rope")] * model.n_layer
    if family.window is not None:
        config[family.window] = None
    if family.window_switch is not None:
        config[family.window_switch] = False
    return config | {key: config[family.keys[ours]] for ours, key in family.repeats.items()}
