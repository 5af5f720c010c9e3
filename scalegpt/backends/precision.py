"""Choose the compute dtype that is fastest on a device; on a CPU by timing a slice (a few blocks) of the model."""

import statistics
import time

import torch
from torch import Tensor

from scalegpt.architecture.counting import count_parameters
from scalegpt.backends.base import DTYPES
from scalegpt.backends.capabilities import attention_by_matmuls, device_name
from scalegpt.config import ModelConfig
from scalegpt.errors import InputError
from scalegpt.model.gpt import GPT
from scalegpt.model.loss import make_loss

SLICE_ROWS = 1024
"""The most tokens that the slice is timed with.

With fewer tokens than in training, a narrow model gains less from bf16 than it would in training.
"""

SLICE_PARAMETERS = 1_000_000
"""The slice's target number of parameters, which gives its number of blocks, at least one.

The time of a single narrow block would be too short to measure.
"""

HOPELESS = 4.0
"""How many times as long bf16 must take in each of the first two runs for no more to be timed.

A processor without bf16 instructions takes some ten times as long. It would be timed for half a minute otherwise.
"""

UNKNOWN_VOCAB = 256
"""The vocabulary size that is assumed before the data are read."""


def resolve_precision(wanted: str, device: torch.device, model: ModelConfig, rows: int) -> str:
    """The name of the compute dtype for the setting ``precision``; ``auto`` gives the fastest.

    On CUDA, ``auto`` gives bf16 from compute capability 8.0 on, else fp16. On a CPU it gives bf16 if a slice (a few blocks)
    of the model trains clearly faster in bf16 than in fp32, else fp32. The slice is timed because the processor's flags do
    not tell. With AVX-512 bf16 but without AMX some processors are much faster in bf16 and some slower. With AMX a narrow
    model is slower in bf16.

    Args:
        wanted: the setting ``precision``.
        device: the device that the model runs on.
        model: the model's shape.
        rows: number of tokens in a micro batch, B · T.

    Raises:
        InputError: bf16 is wanted on a GPU without bf16.
    """
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        if wanted == "bf16" and not native:
            raise InputError(f"precision bf16: {device_name(device)} has no bf16; use --precision fp16")
        return wanted if wanted != "auto" else "bf16" if native else "fp16"
    return wanted if wanted != "auto" else "bf16" if bf16_pays_on_cpu(model, rows) else "fp32"


def bf16_pays_on_cpu(model: ModelConfig, rows: int, *, times: int = 5, gain: float = 1.1) -> bool:
    """Whether forward and backward of a slice of the model take more than ``gain`` times as long in fp32 as in bf16.

    The slice has one or a few of the model's blocks. Medians of alternating runs are compared, unless the first
    two leave no doubt (:data:`HOPELESS`). This takes 0.1 s for a narrow model, a few seconds for a billion parameters.

    Args:
        model: the model's shape.
        rows: number of tokens in a micro batch, B · T.
        times: number of timed runs in each dtype.
        gain: the least speedup for which bf16 is chosen, above the noise of a shared machine.
    """
    slices = {name: _Slice(model, rows, name) for name in ("fp32", "bf16")}
    seconds: dict[str, list[float]] = {name: [] for name in slices}
    for run in range(times + 1):
        for name, each in slices.items():
            start = time.perf_counter()
            each.train()
            seconds[name].append(time.perf_counter() - start)
        if run == 1 and gain * min(seconds["bf16"]) > HOPELESS * max(seconds["fp32"]):
            return False
    fp32, bf16 = (statistics.median(seconds[name][1:]) for name in slices)  # the first run of each selects kernels
    return fp32 > gain * bf16


class _Slice:
    """A small model with one or a few blocks of a whole model, and a vocabulary reduced in the same ratio.

    Blocks and head then take the same shares of a step's work as in the whole model.

    Args:
        model: shape of the whole model.
        rows: number of tokens in a micro batch.
        precision: name of the compute dtype.
    """

    def __init__(self, model: ModelConfig, rows: int, precision: str) -> None:
        whole = model.changed(vocab_size=model.vocab_size or UNKNOWN_VOCAB)
        layers = max(1, SLICE_PARAMETERS * model.n_layer // count_parameters(whole).total)
        layers = min(layers, model.n_layer)
        vocab = max(64, whole.vocab_size * layers // model.n_layer)
        length = min(model.block_size, rows, SLICE_ROWS)
        shape = model.changed(n_layer=layers, vocab_size=vocab, block_size=length)
        with torch.device("meta"):
            self.model = GPT(shape, make_loss("chunked", 1024, compiled=False))
        self.model.set_precision(DTYPES[precision], DTYPES[precision])
        by_matmuls = attention_by_matmuls("auto", precision, torch.device("cpu"), dropout=model.dropout > 0)
        self.model.set_attention("auto", attend=by_matmuls.attend)
        self.model.to_empty(device="cpu")
        random = torch.Generator().manual_seed(0)  # leaves the run's own generator alone
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter, std=0.02, generator=random)
        size = (max(1, min(rows, SLICE_ROWS) // length), length)
        self.tokens: Tensor = torch.randint(vocab, size, generator=random)

    def train(self) -> None:
        """Run forward and backward once."""
        self.model(self.tokens, self.tokens).backward()
