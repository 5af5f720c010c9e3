"""How many cards, in how many machines: read where a text is clear, refused where it is not."""

import pytest

from scalegpt.config.machine import MachineConfig
from scalegpt.errors import InputError
from scalegpt.hardware.gpus import find_card
from scalegpt.hardware.machine import read_counts

CLEAR = {
    "2x 3090": ("RTX 3090", 2, 1), "2x3090": ("RTX 3090", 2, 1), "3090 x2": ("RTX 3090", 2, 1), "3090 2x": ("RTX 3090", 2, 1),
    "8x A100 80GB": ("A100 80GB", 8, 1), "8 A100 80GB GPUs": ("A100 80GB", 8, 1), "a100-80gb x8": ("A100 80GB", 8, 1),
    "A100 80GB:8": ("A100 80GB", 8, 1), "A100-80GB*8": ("A100 80GB", 8, 1), "A100 80GB (x8)": ("A100 80GB", 8, 1),
    "2 x H100 SXM": ("H100 SXM", 2, 1), "8 × H100": ("H100 SXM", 8, 1), "8xH100": ("H100 SXM", 8, 1),
    "dual 4090": ("RTX 4090", 2, 1), "two RTX 4090s": ("RTX 4090", 2, 1), "a pair of 3090s": ("RTX 3090", 2, 1),
    "quad RTX A6000": ("RTX A6000", 4, 1), "eight H200": ("H200", 8, 1), "4x l40s": ("L40S", 4, 1),
    "one 4090": ("RTX 4090", 1, 1),
    "8 cards of 4090": ("RTX 4090", 8, 1), "2x V100-SXM2-32GB": ("V100 32GB SXM", 2, 1), "1024x H100": ("H100 SXM", 1024, 1),
    "4x L40S across 2 nodes": ("L40S", 2, 2), "16 H100 over two machines": ("H100 SXM", 8, 2),
    "2 nodes of 8x A100 80GB": ("A100 80GB", 8, 2), "2 nodes with 8 H100 each": ("H100 SXM", 8, 2),
    "8 A100 40GB per node on 4 nodes": ("A100 40GB", 8, 4), "8x H100/node x 4 nodes": ("H100 SXM", 8, 4),
    "8x 4090 on one machine": ("RTX 4090", 8, 1), "H100 on 4 nodes": ("H100 SXM", 1, 4),
    "4090": ("RTX 4090", 1, 1), "RTX 2060 12 GB": ("RTX 2060 12GB", 1, 1), "NVIDIA A100-SXM4-40GB": ("A100 40GB", 1, 1),
    "NVIDIA H100 80GB HBM3": ("H100 SXM", 1, 1), "GH200 480GB": ("GH200", 1, 1),
    "RTX 5060 Ti 16GB": ("RTX 5060 Ti 16GB", 1, 1),
}  # fmt: skip

UNCLEAR = {
    "2x8 H100": "can be read in several ways", "8x 2x 3090": "can be read in several ways",
    "8x H100 on 2 nodes": "8 cards in each of 2 machines, or in all?", "2 nodes, 8x H100": "or in all?",
    "3x L40S across 2 nodes": "3 cards do not divide into 2 machines", "4090 + 3090": "names several cards",
    "2x 4090 and 2x 3090": "names several cards", "4090, 3090": "names several cards", "0x 3090": "gpus must be at least 1",
    "8x H100 across 0 nodes": "do not divide into 0 machines", "9999999x 4090": "gpus must be at most",
}  # fmt: skip


@pytest.mark.parametrize("text", CLEAR)
def test_a_clear_number_is_read(text: str) -> None:
    settings, said = read_counts(MachineConfig(gpu=text), {"gpu"})
    assert settings.gpu is not None
    assert (find_card(settings.gpu).name, settings.gpus or 1, settings.nodes) == CLEAR[text]
    numbers = [
        f"--{key} {value}"
        for key, value in (("gpus", settings.gpus), ("nodes", settings.nodes))
        if f"--{key}" in "".join(said)
    ]
    assert bool(said) == (settings.gpus is not None or settings.nodes > 1)
    assert all(repr(text) in note and all(number in note for number in numbers) for note in said)


@pytest.mark.parametrize("text", UNCLEAR)
def test_an_unclear_number_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(InputError) as caught:
        read_counts(MachineConfig(gpu=text), {"gpu"})
    assert UNCLEAR[text] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_number_that_contradicts_another_is_refused() -> None:
    with pytest.raises(InputError, match="says 2 gpus, but --gpus says 4; give one of them"):
        read_counts(MachineConfig(gpu="2x 3090", gpus=4), {"gpu", "gpus"})
    with pytest.raises(InputError, match="says 2 nodes, but --nodes says 1"):
        read_counts(MachineConfig(gpu="4x 3090 across 2 nodes", nodes=1), {"gpu", "nodes"})
    assert read_counts(MachineConfig(gpu="2x 3090", gpus=2), {"gpu", "gpus"})[0].gpus == 2


def test_an_unknown_card_is_named_without_its_number() -> None:
    for text, name in (("4x gaudi3", "gaudi3"), ("8x RTX 4050", "RTX 4050"), ("2 x foo", "foo")):
        settings, _ = read_counts(MachineConfig(gpu=text), {"gpu"})
        assert settings.gpu == name


def test_the_processor_may_be_counted_too() -> None:
    assert read_counts(MachineConfig(gpu="2x cpu"), {"gpu"})[0] == MachineConfig(gpu="cpu", gpus=2)
    assert read_counts(MachineConfig(gpu="CPU"), {"gpu"})[0].at_hand
    assert read_counts(MachineConfig(), set())[0] == MachineConfig()
