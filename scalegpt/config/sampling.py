"""How text is sampled from a trained model."""

from dataclasses import dataclass

from scalegpt.config.settings import Section, setting


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(Section):
    """How many tokens are sampled, and how: temperature, then top-k, then top-p among the tokens that top-k keeps.

    Raises:
        InputError: a value is outside its bounds.
    """

    max_new_tokens: int = setting(
        256, "the most tokens of a sample; it is shorter if the model ends the text", minimum=1, maximum=10**9
    )
    temperature: float = setting(
        1.0, "below 1: likelier tokens; above 1: more variety; 0: always the likeliest token", minimum=0, maximum=1000
    )
    top_k: int | None = setting(None, "sample among the k likeliest tokens; none: among all", minimum=1, maximum=10**9)
    top_p: float | None = setting(
        None,
        "sample among the fewest likeliest tokens whose probabilities add up to p; none: among all",
        above=0,
        maximum=1,
    )
    seed: int = setting(1337, "the same seed gives the same text", minimum=0, maximum=2**63 - 1)
