"""How much memory initial weights take while they are loaded: this rank's share and a block, never the model."""

import json
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.initial_memory import main
from scalegpt.backends import World, build_model, make_backend
from scalegpt.config.presets import resolve
from scalegpt.optim.factory import optimizer_factory
from scalegpt.weights.origin import Origin


@pytest.mark.slow
@pytest.mark.parametrize("source", ["random", "hf"])
def test_a_rank_holds_its_share_and_at_most_a_block(source: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--layers", "24", "--narrow", "--source", source, "--limit_gb", "2", "--json"]) == 0
    for rank in json.loads(capfd.readouterr().out.splitlines()[-1]):
        assert rank["peak"] >= rank["shard"]  # else nothing was measured
        assert rank["peak"] <= 1.05 * rank["shard"] + rank["block"], rank


@pytest.mark.parametrize("through_origin", [False, True])
def test_a_whole_tensor_is_gone_before_the_next_is_made(one_thread: None, through_origin: bool) -> None:
    run = resolve(preset="tiny", flags={"backend": "plain", "precision": "fp32", "vocab_size": 64, "n_layer": 2})
    world = World(0, 1, 0, 1, torch.device("cpu"))
    backend = make_backend(run, world, 1, build_model(run, compiled=False), optimizer_factory(run.train))
    alive: list[weakref.ref[Tensor]] = []
    counts = []

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, shape in backend.model.shapes.items():
            counts.append(sum(each() is not None for each in alive))
            value = torch.ones(shape)
            alive.append(weakref.ref(value))
            yield name, value
            del value

    backend.load_weights(Origin(run.model, weights).weights(run.model) if through_origin else weights())
    assert set(counts) == {0}
    assert len(counts) == len(list(backend.model.parameters()))
