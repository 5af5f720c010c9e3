"""Settings for loading a trained model, and for evaluating it."""

from dataclasses import dataclass

from scalegpt.config.settings import Section, setting
from scalegpt.config.train import PRECISIONS

LAST, BEST = "last", "best"
"""The words of the setting ``checkpoint`` that are not a step."""


@dataclass(frozen=True, kw_only=True)
class InferenceSettings(Section):
    """Which checkpoint of a run is loaded, and the device, dtype and batch with which the model computes.

    Raises:
        InputError: a value is outside its bounds.
    """

    checkpoint: str = setting(LAST, "a step; best: the lowest held-out loss; last: the newest")
    device: str = setting(
        "auto", "where to compute; auto: CUDA if there is a CUDA device", choices=("auto", "cpu", "cuda")
    )
    precision: str = setting(
        "auto", "compute dtype; auto: bf16 on a CUDA device with bf16 units, else fp32", choices=PRECISIONS
    )
    micro_batch: int = setting(8, "sequences computed at once; more need more memory", minimum=1, maximum=10**6)


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(InferenceSettings):
    """How ``scalegpt eval`` cuts a text into windows, and how the model is loaded.

    Raises:
        InputError: a value is outside its bounds.
    """

    stride: int | None = setting(
        None,
        "tokens from the start of one window to the next; a smaller number gives tokens more context and takes "
        "longer; none: block_size, so that windows do not overlap",
        minimum=1,
        maximum=10**9,
    )
