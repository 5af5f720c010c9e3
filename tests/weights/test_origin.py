"""Weights of Hugging Face folders: the same logits here as there, and files that cannot be used, each with its reason."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from scalegpt.config import ModelConfig
from scalegpt.errors import InputError
from scalegpt.interop.families import as_config, read_config
from scalegpt.model.gpt import GPT
from scalegpt.weights.origin import Origin, open_folder
from weights.foreign import BLOCK, MODELS, VOCABULARY, random_model, saved


def opened(folder: Path) -> Origin:
    return open_folder(read_config(folder))


def loaded(origin: Origin, model: ModelConfig) -> GPT:
    gpt = GPT(model).eval()
    with torch.no_grad():
        for name, value in origin.weights(model):
            assert value.dtype == torch.float32
            gpt.get_parameter(name).copy_(value)
    return gpt


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_and_loss_equal_those_of_transformers(name: str, tmp_path: Path, one_thread: None) -> None:
    theirs = random_model(name)
    origin = opened(saved(theirs, tmp_path))
    ours = loaded(origin, origin.model)
    tokens = torch.randint(VOCABULARY, (2, BLOCK), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    for length in (1, 2, 31, BLOCK):
        assert (ours(tokens[:, :length]) - expected[:, length - 1]).abs().max() <= 1e-5 * expected.abs().max()
    loss = theirs(tokens, labels=tokens).loss
    assert abs(ours(tokens[:, :-1], tokens[:, 1:]) - loss) <= 1e-5 * loss


@pytest.mark.parametrize("options", [{"max_shard_size": "20KB"}, {}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_and_half_precision_are_read(tmp_path: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    model = random_model("gpt2").to(dtype)
    origin = opened(saved(model, tmp_path, **options))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == bool(options)
    values = dict(origin.weights(origin.model))
    assert torch.equal(values["blocks.1.mlp.fc.weight"], model.transformer.h[1].mlp.c_fc.weight.T.float())


def test_pytorch_files_are_read_without_running_code(tmp_path: Path) -> None:
    model = random_model("gpt2")
    folder = saved(model, tmp_path / "pickled")
    weights = load_file(folder / "model.safetensors")
    expected = dict(opened(folder).stored())
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert all(torch.equal(value, expected[name]) for name, value in opened(folder).stored())
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2])):
        torch.save({name: weights[name] for name in part}, folder / f"part-{number}.bin")
    index = {"weight_map": {name: f"part-{int(name in names[1::2])}.bin" for name in names}}
    (folder / "pytorch_model.bin").rename(tmp_path / "elsewhere")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert all(torch.equal(value, expected[name]) for name, value in opened(folder).stored())


def test_names_that_older_files_have_are_understood(tmp_path: Path) -> None:
    model = random_model("gpt2")
    folder = saved(model, tmp_path)
    expected = dict(opened(folder).stored())
    weights = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in weights.items()}
    bare |= {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    bare["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    save_file(bare, folder / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in opened(folder).stored())
    bare["lm_head.weight"][3, 3] += 1
    save_file(bare, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head\.weight differs from the embedding"):
        list(opened(folder).stored())


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    folder = saved(random_model("gpt2"), tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.weight"][2, 3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"weights of blocks\.1\.mlp\.fc\.weight are not all finite"):
        list(opened(folder).stored())


def test_a_vocabulary_is_padded_with_the_mean_and_cut(tmp_path: Path) -> None:
    origin = opened(saved(random_model("gpt2 untied, exact gelu"), tmp_path))
    stored = dict(origin.stored())
    padded = dict(origin.weights(origin.model.changed(vocab_size=128)))
    cut = dict(origin.weights(origin.model.changed(vocab_size=50, block_size=16)))
    for name in ("wte.weight", "head.weight"):
        assert torch.equal(padded[name][:VOCABULARY], stored[name])
        assert torch.equal(padded[name][VOCABULARY:], stored[name].mean(0).expand(128 - VOCABULARY, -1))
        assert torch.equal(cut[name], stored[name][:50])
    assert torch.equal(cut["wpe.weight"], stored["wpe.weight"][:16])
    assert torch.equal(padded["blocks.0.ln1.bias"], stored["blocks.0.ln1.bias"])


# --- what is refused, without transformers -----------------------------------------------------------------------------

SHAPE = ModelConfig(n_layer=1, n_embd=8, n_head=2, block_size=4, vocab_size=11, bias=True, activation="gelu_tanh")


def tensors() -> dict[str, torch.Tensor]:
    from scalegpt.weights.layouts import targets
    from scalegpt.weights.table import HUGGING_FACE

    return {target.name: torch.zeros(target.shape) for target in targets(SHAPE, HUGGING_FACE["gpt2"])}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(as_config(SHAPE)))
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        list(opened(folder).stored())
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def change(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        values = tensors()
        edit(values)
        save_file(values, folder / "model.safetensors")

    return apply


def header(text: bytes, size: int | None = None, rest: bytes = b"") -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        length = len(text) if size is None else size
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + text + rest)

    return apply


def sharded(places: Any, *, written: bool = True) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        document = {"weight_map": dict.fromkeys(tensors(), places) if isinstance(places, str) else places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(document) if written else "{")

    return apply


LN = "transformer.ln_f.weight"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (change(lambda values: values.pop(LN)), f"its weights lack the tensor {LN} of its config.json"),
        (change(lambda values: [values.pop(name) for name in list(values)[:3]]), "and 2 more of its config.json"),
        (change(lambda values: values.update(extra=torch.zeros(2))), "its weights have 'extra', which"),
        (change(lambda values: values.update({LN: torch.zeros(9)})), f"{LN} has the shape [9], but config.json"),
        (change(lambda values: values.update({LN: torch.zeros(8, dtype=torch.int8)})), f"{LN} has the dtype I8"),
        (change(lambda values: values.update({LN: torch.zeros(8, dtype=torch.float64)})), "fp32, bf16 or fp16"),
        (header(b"{}", size=2**62), "is damaged or cut short"),
        (header(b"{}", size=10**8), "is damaged or cut short"),
        (header(b'{"a":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,4]}}', rest=b"0"), "damaged"),
        (header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', rest=b"00000000"), "damaged or cut short"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "is damaged or cut short"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (sharded("../a.safetensors"), "is not a file of weights in its own folder"),
        (sharded("/etc/passwd"), "is not a file of weights in its own folder"),
        (sharded("a.py"), "is not a file of weights in its own folder"),
        (sharded("b.safetensors"), "b.safetensors, which model.safetensors.index.json names is missing"),
        (sharded([]), "has no weight_map"),
        (sharded("a.safetensors", written=False), "not JSON"),
    ],
)  # fmt: skip
def test_weights_that_cannot_be_used_are_refused(folder: Path, damage: Callable[[Path], None], expected: str) -> None:
    list(opened(folder).stored())
    damage(folder)
    assert expected in refusal(folder)


def test_a_shard_that_is_cut_short_is_named(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    assert "model.safetensors is damaged or cut short" in refusal(folder)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(folder: Path) -> None:
    import os

    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    assert "is not a plain file" in refusal(folder)


def test_two_shards_with_the_same_tensor_are_refused(folder: Path) -> None:
    save_file({LN: torch.zeros(8)}, folder / "b.safetensors")
    names = dict.fromkeys(tensors(), "a.safetensors")
    sharded({**names, LN: "b.safetensors"})(folder)
    assert "which another file of" in refusal(folder)


class Code:
    def __reduce__(self) -> Any:
        return print, ("code of a stranger runs",)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (lambda: {"a": Code()}, "is a pickle with more than tensors"),
        (lambda: {**tensors(), "a": 1}, "holds more than named tensors"),
        (lambda: [torch.zeros(1)], "holds more than named tensors"),
    ],
)
def test_pickles_with_more_than_tensors_are_refused(
    folder: Path, content: Callable[[], Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content(), folder / "pytorch_model.bin")
    assert expected in refusal(folder)
    assert capsys.readouterr().out == ""


def test_a_pickle_that_is_cut_short_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tensors(), folder / "pytorch_model.bin")
    content = (folder / "pytorch_model.bin").read_bytes()
    for kept in (0, 10, len(content) // 2):
        (folder / "pytorch_model.bin").write_bytes(content[:kept])
        assert "is damaged or cut short" in refusal(folder)
