"""How text is drawn from a trained model."""

from dataclasses import dataclass

from scalegpt.config.settings import Section, setting


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(Section):
    """How many tokens, and how each is drawn.

    The temperature reshapes the distribution, top-k cuts it, and top-p cuts what top-k left.

    Raises:
        InputError: a value outside its bounds.
    """

    max_new_tokens: int = setting(
        256, "most tokens of a sample; it ends earlier where the model ends the text", minimum=1, maximum=10**9
    )
    temperature: float = setting(
        1.0, "below 1 is safer, above 1 is wilder; 0 always takes the likeliest token", minimum=0, maximum=1000
    )
    top_k: int | None = setting(None, "draw among the k likeliest tokens; none: among all", minimum=1, maximum=10**9)
    top_p: float | None = setting(
        None, "draw among the fewest likeliest tokens whose probabilities reach p together; none: among all",
        above=0, maximum=1,
    )  # fmt: skip
    seed: int = setting(1337, "seed of the draws: the same seed gives the same text", minimum=0, maximum=2**63 - 1)
