"""How rotary positions are stretched beyond the context length that a model was first trained with."""

from dataclasses import dataclass, fields

from scalegpt.config.settings import Section, setting
from scalegpt.errors import InputError

LINEAR, LLAMA3, YARN = "linear", "llama3", "yarn"

_DEFAULTS: dict[str, dict[str, float | None]] = {
    LINEAR: {},
    LLAMA3: {"original_block_size": None, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    YARN: {"original_block_size": None, "beta_fast": 32.0, "beta_slow": 1.0},
}
"""Type → the keys that it has besides ``factor``, and their defaults; None: the key must be given."""

_OPTIONAL = {YARN: {"attention_factor"}}


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Section):
    """The setting ``rope_scaling``: an object with the key ``type`` and the keys of that type.

    - ``linear``: positions are divided by ``factor`` (Chen et al. 2023, arXiv 2306.15595).
    - ``llama3``: low frequencies are divided by ``factor``, high ones are kept (Llama 3.1; Grattafiori et al. 2024,
      arXiv 2407.21783).
    - ``yarn``: the same, with a linear ramp between low and high, and logits scaled by ``attention_factor``² (Peng et
      al. 2023, arXiv 2309.00071).

    Raises:
        InputError: a value is outside its bounds, a key does not belong to the type, or a required key is missing.
    """

    type: str = setting(LINEAR, "the kind of scaling", choices=(LINEAR, LLAMA3, YARN))
    factor: float = setting(1.0, "the new context length divided by the old", minimum=1, maximum=1_000_000)
    original_block_size: int | None = setting(
        None, "context length before the scaling, in tokens", minimum=1, maximum=100_000_000
    )
    low_freq_factor: float | None = setting(
        None, "llama3: a wavelength above original_block_size / X is scaled by factor", above=0, maximum=1_000_000
    )
    high_freq_factor: float | None = setting(
        None, "llama3: a wavelength below original_block_size / X is not scaled", above=0, maximum=1_000_000
    )
    beta_fast: float | None = setting(
        None, "yarn: a frequency with more than X rotations in the original context is not scaled", above=0, maximum=1e6
    )
    beta_slow: float | None = setting(
        None,
        "yarn: a frequency with less than X rotations in the original context is scaled by factor",
        above=0,
        maximum=1e6,
    )
    attention_factor: float | None = setting(
        None, "yarn: queries and keys are multiplied by X; none: 0.1 · ln(factor) + 1", above=0, maximum=1_000_000
    )

    def check(self) -> None:
        """Refuse keys of another type, and missing ones; fill in the defaults of the type."""
        keys = _DEFAULTS[self.type]
        for key in (field.name for field in fields(self)):
            value = getattr(self, key)
            known = {"type", "factor", *keys, *_OPTIONAL.get(self.type, ())}
            if value is not None and key not in known:
                raise InputError(f"rope_scaling: {key} does not belong to type {self.type}; remove it")
            if value is None and key in keys:
                if keys[key] is None:
                    raise InputError(f"rope_scaling: type {self.type} needs {key}")
                object.__setattr__(self, key, keys[key])
        self._check_order("low_freq_factor", "high_freq_factor")
        self._check_order("beta_slow", "beta_fast")

    def _check_order(self, lower: str, higher: str) -> None:
        low, high = getattr(self, lower), getattr(self, higher)
        if low is not None and not low < high:
            raise InputError(f"rope_scaling: {lower} {low:g} must be less than {higher} {high:g}")

    def as_dict(self) -> dict[str, str | float]:
        """The keys that are set, in the form of a configuration file."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: value for key, value in values.items() if value is not None}

    def __str__(self) -> str:
        """The scaling in the form of a flag's value, for example ``{type: linear, factor: 2.0}``."""
        return "{" + ", ".join(f"{key}: {value}" for key, value in self.as_dict().items()) + "}"
