"""How a trained model is loaded to be used, and how it is evaluated."""

from dataclasses import dataclass

from scalegpt.config.settings import Section, setting
from scalegpt.config.train import PRECISIONS

LAST, BEST = "last", "best"
"""The words of the setting ``checkpoint`` that are not a step."""


@dataclass(frozen=True, kw_only=True)
class InferenceSettings(Section):
    """Which checkpoint of a run is loaded, where and in what dtype it computes, and how much of it at once.

    Raises:
        InputError: a value is outside its bounds.
    """

    checkpoint: str = setting(LAST, "a step; best: the lowest held-out loss; last: the newest")
    device: str = setting("auto", "where to compute; auto: CUDA if there is any", choices=("auto", "cpu", "cuda"))
    precision: str = setting(
        "auto", "compute dtype; auto: bf16 on a CUDA device with bf16 units, else fp32", choices=PRECISIONS
    )
    micro_batch: int = setting(8, "sequences computed at once; more take more memory", minimum=1, maximum=10**6)


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(InferenceSettings):
    """How ``scalegpt eval`` cuts a text into windows, besides how the model is loaded.

    Raises:
        InputError: a value is outside its bounds.
    """

    stride: int | None = setting(
        None,
        "tokens from one window to the next: fewer give tokens more context and take longer; none: block_size, so that "
        "windows do not overlap",
        minimum=1,
        maximum=10**9,
    )
