"""Accelerators for which no plans are made, each with the reason and the card that is closest in memory and speed."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Unsupported:
    """A kind of accelerator for which no plans are made.

    Attributes:
        pattern: a regular expression that finds the accelerator in a user's text in lower case.
        why: the reason, for the error message.
        closest: the name of the catalogue's card that is closest in memory and speed; None: no card is close.
    """

    pattern: str
    why: str
    closest: str | None


_APPLE = (
    "Apple's GPUs are not supported: FSDP and DeepSpeed do not run there; on a Mac, train on the processor (--gpu cpu)"
)
_GAUDI = "Intel's Gaudi is not supported: training runs on CUDA, ROCm or a processor"
_TPU = "Google's TPUs are not supported: training runs on CUDA, ROCm or a processor"
_AWS = "AWS's Trainium and Inferentia are not supported: training runs on CUDA, ROCm or a processor"
_SHARED = "it shares its memory with the processor, which the planner does not count"
_INTEL = "Intel's GPUs are not supported: training runs on CUDA, ROCm or a processor"
_RADEON = "AMD's cards other than Instinct are not in the catalogue"
_OLD = "cards before Volta are not supported: torch.compile needs compute capability 7.0, and torch's newer builds skip them"
_LAPTOP = "laptop cards are not in the catalogue: they have less memory and speed than their desktop namesakes"
_OTHER = "it is not supported: training runs on CUDA, ROCm or a processor"

_KINDS = (
    # Source for the memory and peaks of Gaudi, TPU and Trainium: github.com/stas00/ml-engineering compute/accelerator
    (r"\bgaudi\W*3|\bhl-?3\d\d\b", _GAUDI, "H200"),
    (r"\bgaudi\W*1\b|\bhl-?20\d\b", _GAUDI, "V100 32GB SXM"),
    (r"\bgaudi|\bhabana|\bhpu\b|\bhl-?2\d\d\b", _GAUDI, "A100 80GB"),
    (r"\btpu\W*v?5e|\bv5e\b|\bv5litepod", _TPU, "RTX 4080"),
    (r"\btpu\W*v?[23]\b", _TPU, "V100 32GB SXM"),
    (r"\btpu\W*v?4\b", _TPU, "A100 40GB"),
    (r"\btrillium|\btpu\W*v?6|\bv6e\b", _TPU, "RTX 5090"),
    (r"\btpu|\bv5p\b|\bironwood", _TPU, "A100 80GB"),
    (r"\btrn1|\btrainium\W*1?\b(?!\W*2)|\binf[12]\b|\binferentia", _AWS, "V100 32GB SXM"),
    (r"\btrn2|\btrainium", _AWS, "H100 SXM"),
    (r"\bjetson|\b(agx|orin|xavier)\b|\btegra|\bthor\b", f"NVIDIA's Jetson is not supported: {_SHARED}", "A2"),
    (r"\bdgx\W*spark|\bgb10\b", f"the DGX Spark is not supported: {_SHARED}", "L4"),
    (r"\bmi300a\b", f"the MI300A is not supported: {_SHARED}", "MI300X"),
    (r"\bmi\W*100\b|\bmi\W*[56]0\b", "the older Instinct cards are not in the catalogue", "MI210"),
    (r"\bstrix|\bryzen|\bradeon\W*\d{3}m\b|\b8060s\b", f"processors with a GPU are not supported: {_SHARED}", "RTX 4060"),
    (r"\barc\b.*a770|\bdata\W*center\W*gpu\W*flex", _INTEL, "RTX 4060 Ti 16GB"),
    (r"\b(arc\b.*b580|b580)\b", _INTEL, "RTX 3060"),
    (r"\bponte\W*vecchio|\bdata\W*center\W*gpu\W*max|\bmax\W*1[15]50\b", _INTEL, "MI210"),
    (r"\bintel\b|\barc\W*[ab]\d{3}|\barc\b|\biris\b|\bxpu\b", _INTEL, "RTX 3060"),
    (r"\bapple|\bmac(book|\W*(mini|studio|pro))?\b|\bimac\b|\bmps\b|\bmetal\b", _APPLE, "RTX 3060"),
    (r"^\W*m[1-9]\b(\W*(pro|max|ultra)\b.*|\W*\d+\W*gb?)?$", _APPLE, "RTX 3060"),
    # Source for the memory of Radeon cards: techpowerup.com
    (r"\b7900\W*xtx|\bw7800\b", _RADEON, "RTX 3090"),
    (r"\b7900\W*xt\b|\b7900\W*gre\b", _RADEON, "RTX 4000 Ada"),
    (r"\b(9070|7800|6[89]00|vii)\b.*|\bw6800\b", _RADEON, "RTX 4060 Ti 16GB"),
    (r"\bw7900\b", _RADEON, "RTX A6000"),
    (r"\b(rx|radeon)\W*\w*", _RADEON, "RTX 3060"),
    (r"\b4090\W*(laptop|mobile|m)\b", _LAPTOP, "RTX 4080"),
    (r"\b4080\W*(laptop|mobile|m)\b", _LAPTOP, "RTX 4070"),
    (r"\b40[5-7]0\W*(laptop|mobile|m)\b", _LAPTOP, "RTX 4060"),
    (r"\b30[78]0\W*(ti\W*)?(laptop|mobile|m)\b", _LAPTOP, "RTX 3060 Ti"),
    (r"\b(laptop|mobile|notebook|(?<!blackwell )max\W*q)\b", _LAPTOP, None),
    # Source for the memory of cards before Volta: techpowerup.com
    (r"\bp100\b", _OLD, "T4"),
    (r"\bp40\b|\bm40\W*24|\bp6000\b", _OLD, "Quadro RTX 6000"),
    (r"\b1080\W*ti\b", _OLD, "RTX 2080 Ti"),
    (r"\b1080\b|\b1070(\W*ti)?\b|\bp4\b|\bm60\b", _OLD, "RTX 2070"),
    (r"\b1060\b", _OLD, "RTX 2060"),
    (r"\b10[35]0(\W*ti)?\b|\bgtx\W*9\d\d|\bm2000\b", _OLD, "GTX 1650"),
    (r"\bk80\b|\bm40\b|\btitan\W*(x\b|xp\b|z\b|black)", _OLD, "RTX 2060 12GB"),
    (r"\bk[124]0\b|\bgtx\W*[5-7]\d\d|\bquadro\W*[kmp]\d+", _OLD, None),
    (r"\btitan\W*v\b", "the TITAN V is not in the catalogue", "V100 16GB PCIe"),
    (r"\bascend|\b910[abc]?\b|\bcambricon|\bmlu\d*|\bipu\b|\bgraphcore|\bcerebras|\bgroq|\bmtt\b|\bnpu\b|\bdirectml|\bvulkan",
     _OTHER, None),
)  # fmt: skip

UNSUPPORTED = tuple(Unsupported(*kind) for kind in _KINDS)
"""All kinds of unsupported accelerators. If several patterns fit a name, the first of them counts."""


def unsupported(name: str) -> Unsupported | None:
    """The kind of unsupported accelerator that a user's name stands for; None if it stands for none."""
    text = name.lower().replace("_", " ")
    return next((kind for kind in UNSUPPORTED if re.search(kind.pattern, text)), None)
