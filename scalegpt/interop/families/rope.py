"""Rotary positions in ``config.json``: in the form of transformers 5 (``rope_parameters``) and in the earlier form."""

import math
from collections.abc import Mapping
from typing import Any

from scalegpt.config.rope import LINEAR, LLAMA3, YARN, RopeScaling
from scalegpt.config.shape import ModelConfig
from scalegpt.errors import InputError
from scalegpt.interop.families.table import Family
from scalegpt.text import shown

_KEYS = {
    LINEAR: ("factor",),
    LLAMA3: ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    YARN: ("factor", "beta_fast", "beta_slow", "attention_factor", "original_max_position_embeddings"),
}
"""Type of scaling → its keys in the file."""

_ORIGINAL = "original_max_position_embeddings"
_OURS = {_ORIGINAL: "original_block_size"}


def read_rope(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Read ``rope_theta``, ``rotary_share`` and ``rope_scaling`` from a configuration. The caller checks their values.

    Args:
        family: a family with rotary positions.
        config: the parsed file, with the defaults of the family.

    Raises:
        InputError: ScaleGPT does not have this kind of scaling, or a value is not in the form that transformers writes.
    """
    assert family.theta is not None
    values = _parameters(config)
    theta_key, theta = family.theta
    settings = {"rope_theta": values.get("rope_theta", config.get(theta_key, theta))}
    share_key, share = family.share or ("partial_rotary_factor", 1.0)
    rotated = values.get("partial_rotary_factor", config.get(share_key, share))
    if family.share is None and rotated not in (None, 1):
        raise InputError(f"partial_rotary_factor {shown(rotated)} has no meaning in {family.name}")
    settings["rotary_share"] = share if rotated is None else rotated
    kind = values.get("rope_type", values.get("type", "default"))
    if kind != "default":
        settings["rope_scaling"] = _scaling(kind, values, config[family.keys["block_size"]])
    return settings


def _parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The object with rotary parameters. If the file has one for each kind of layer, it is that of full attention."""
    for key in ("rope_scaling", "rope_parameters"):
        values = config.get(key)
        if values is None or values == {}:
            continue
        if not isinstance(values, dict):
            raise InputError(f"{key} must be an object, not {shown(values)}")
        by_layer = values.get("full_attention", values)
        if isinstance(by_layer, dict):
            return by_layer
    return {}


def _scaling(kind: Any, values: Mapping[str, Any], positions: Any) -> RopeScaling:
    if not isinstance(kind, str) or kind not in _KEYS:
        raise InputError(
            f"rotary positions of type {shown(kind)} are not supported; supported: default, {', '.join(_KEYS)}"
        )
    if values.get("truncate") is False:
        raise InputError(f"{kind} without truncate is not supported")
    given = {_OURS.get(key, key): values[key] for key in _KEYS[kind] if values.get(key) is not None}
    if _ORIGINAL in _KEYS[kind]:
        given.setdefault("original_block_size", positions)
    if kind == YARN:
        given.setdefault("factor", _ratio(positions, given["original_block_size"]))
        given |= _attention_factor(values, given["factor"])
    if "factor" not in given:
        raise InputError(f"rotary positions of type {kind} need a factor")
    return RopeScaling.from_mapping({"type": kind, **given}, "rotary positions")


def _attention_factor(values: Mapping[str, Any], factor: Any) -> dict[str, float]:
    """Yarn's attention factor in DeepSeek's form: the ratio of the scales for ``mscale`` and ``mscale_all_dim``."""
    scale, whole = values.get("mscale"), values.get("mscale_all_dim")
    if values.get("attention_factor") is not None or not scale or not whole:
        return {}
    try:
        logarithm = 0.1 * math.log(max(float(factor), 1.0))
        return {"attention_factor": (float(scale) * logarithm + 1.0) / (float(whole) * logarithm + 1.0)}
    except (TypeError, ValueError, ZeroDivisionError):
        raise InputError("mscale, mscale_all_dim and factor of rotary positions must be numbers") from None


def _ratio(positions: Any, original: Any) -> float:
    try:
        return float(positions) / float(original)
    except (TypeError, ValueError, ZeroDivisionError):
        raise InputError(f"{_ORIGINAL} must be a positive number, not {shown(original)}") from None


def write_rope(family: Family, model: ModelConfig) -> dict[str, Any]:
    """The keys of rotary positions in the earlier form, which all releases of transformers and llama.cpp read."""
    if family.theta is None:
        return {}
    written: dict[str, Any] = {family.theta[0]: model.rope_theta, "rope_scaling": None}
    if family.share is not None:
        written[family.share[0]] = model.rotary_share
    if model.rope_scaling is not None:
        theirs = {ours: key for key, ours in _OURS.items()}
        values = model.rope_scaling.as_dict()
        kind = values.pop("type")
        written["rope_scaling"] = {"rope_type": kind} | {theirs.get(key, key): value for key, value in values.items()}
    return written
