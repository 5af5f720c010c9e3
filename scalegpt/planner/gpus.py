"""What is known of each GPU: for now its dense peak, which MFU is a share of."""

import re
from functools import cache
from pathlib import Path
from typing import Any

_HALF_PRECISION = ("bf16", "fp16")

_VARIANTS = frozenset({"ti", "super", "laptop", "max", "mobile", "nvl", "d", "mig"})
"""Words that make another card of a name: an RTX 3080 Ti is no RTX 3080, a MIG slice no whole card."""


def peak_flops(card: str, precision: str) -> float | None:
    """The card's dense peak in FLOP/s.

    Args:
        card: the driver's name of the card, such as ``NVIDIA A100-SXM4-40GB``.
        precision: the compute dtype, ``bf16`` or ``fp16``.

    Returns:
        The peak, or None for a card or dtype that is not in ``gpus.yaml``: MFU is then not shown rather than wrong.
    """
    words = set(re.findall("[a-z0-9]+", card.lower()))  # whole words: an RTX A4000 is no A40
    if words & _VARIANTS:
        return None
    for entry in _catalogue():
        if words.issuperset(entry["match"]):
            has_dtype = precision in entry.get("dtypes", _HALF_PRECISION)
            return float(entry["tflops"]) * 1e12 if has_dtype else None
    return None


@cache
def _catalogue() -> list[dict[str, Any]]:
    import yaml

    entries: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("gpus.yaml").read_text(encoding="utf-8"))
    return entries
