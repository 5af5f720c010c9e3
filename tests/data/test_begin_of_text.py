"""Tokenizers that put a token before every text: in prepared data, in prompts and evaluations, and in exports."""

import json
import math
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import scalegpt
import tokenizer_samples as samples
from scalegpt.config import DataConfig
from scalegpt.data.prepare import prepare, prepare_again, prepare_cached
from scalegpt.data.shards import open_tokens
from scalegpt.data.text import packed, reading
from scalegpt.data.tokenizers import HFTokenizer, Tokenizer, load_tokenizer
from scalegpt.data.tokenizers.export import tokenizer_files
from scalegpt.errors import InputError
from scalegpt.inference.loaded import LoadedModel
from tokenizer_samples import BEGIN, TEXT

pytest.importorskip("tokenizers")

FIRST = 600
FORMS = {"sequence": FIRST, "template": FIRST, "both ends": FIRST, "end": None}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tok(tmp_path: Path) -> Path:
    return samples.write_with_begin(tmp_path / "tok")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


def as_before(folder: Path) -> HFTokenizer:
    """The tokenizer as earlier releases described it, which put no token before texts."""
    described = load_tokenizer(str(folder)).as_dict()
    del described["begin_of_text"], described["digest"]
    found = Tokenizer.from_dict(described)
    assert isinstance(found, HFTokenizer)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_a_text_begins_as_transformers_begins_it(form: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = samples.write_with_begin(tmp_path / "tok", form)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ours = load_tokenizer(str(folder))
    assert ours.begin_of_text == FORMS[form]
    ids = theirs("The cat")["input_ids"]
    assert ours.prompt_ids("The cat") == (ids[:-1] if ids[-1] == ours.end_of_text else ids)
    assert ours.prompt_ids("") == [ours.end_of_text if FORMS[form] is None else FIRST]


def test_the_description_keeps_it(tok: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tok))
    described = json.loads(json.dumps(tokenizer.as_dict()))
    again = Tokenizer.from_dict(described)
    assert (described["begin_of_text"], again.begin_of_text, again.digest) == (BEGIN, FIRST, tokenizer.digest)
    (tok / "tokenizer_config.json").unlink()
    assert load_tokenizer(str(tok)).begin_of_text == FIRST
    assert json.loads(tokenizer_files(load_tokenizer(str(tok)))["tokenizer_config.json"])["bos_token"] == BEGIN


def test_several_tokens_are_refused(tok: Path) -> None:
    values = json.loads((tok / "tokenizer.json").read_text())
    single = values["post_processor"]["processors"][1]["single"]
    values["post_processor"]["processors"][1]["single"] = [single[0], *single]
    (tok / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="puts 2 tokens before every text, where models have one; leave one of them"):
        load_tokenizer(str(tok))


@pytest.mark.parametrize("number", [2, 20])
def test_every_document_begins_with_it_and_no_second_half_does(
    number: int, tok: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PIECE_CHARACTERS", 700)
    monkeypatch.setattr(packed, "CHUNK_BYTES", 500)
    folder, tokenizer = tmp_path / "texts", load_tokenizer(str(tok))
    folder.mkdir()
    for each in range(number):
        (folder / f"{each:02}.txt").write_bytes(TEXT[each * 100 : each * 100 + 1500].encode())
    fraction = 0.2 if number == 2 else 0.3  # of these 20 texts, the hashes hold out about 0.3
    tokens = prepare([folder], tmp_path / "out", DataConfig(tokenizer=str(tok), val_fraction=fraction))
    assert tokens.meta["split"]["method"] == ("tails" if number == 2 else "documents")
    whole, tails = [], []
    for path in sorted(folder.iterdir()):
        ids = tokenizer.encode(path.read_bytes().decode()).tolist()
        cut = int(len(ids) * 0.8) if number == 2 else len(ids)
        whole.append([FIRST, *ids[:cut], tokenizer.end_of_text])
        tails.append([*ids[cut:], tokenizer.end_of_text])
    if number == 2:
        assert (tokens.train.tolist(), tokens.val.tolist()) == ([*chain(*whole)], [*chain(*tails)])
        return
    assert sorted(whole) == sorted(
        part.tolist() for split in (tokens.train, tokens.val) for part in documents(np.array(split), tokenizer)
    )


def documents(ids: Any, tokenizer: Tokenizer) -> list[Any]:
    return np.split(ids, np.flatnonzero(ids == tokenizer.end_of_text) + 1)[:-1]


def test_no_token_is_put_before_documents_that_it_ends_too(tok: Path, text: Path, tmp_path: Path) -> None:
    data = DataConfig(tokenizer=str(tok), end_of_text=BEGIN, val_fraction=0.1)
    tokens = prepare([text], tmp_path / "out", data)
    assert (tokens.train[0] != FIRST, tokens.train[-1], tokens.val[-1]) == (True, FIRST, FIRST)
    assert tokens.tokenizer.prompt_ids("a")[0] == FIRST


# --- tokens of earlier releases --------------------------------------------------------------------------------------


def made_before(text: Path, tok: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put the tokens that an earlier release made into the cache; return their digest."""
    data = DataConfig(input_file=str(text), tokenizer=str(tok))
    before = as_before(tok)
    with monkeypatch.context() as patch:
        patch.setattr("scalegpt.data.prepare.load_tokenizer", lambda *_: before)
        tokens = prepare_cached(data)
    shutil.copy(tok / "tokenizer_config.json", tokens.path)
    assert "begin_of_text" not in json.loads((tokens.path / "meta.json").read_text())["tokenizer"]
    assert tokens.train[0] != FIRST
    return open_tokens(tokens.path).digest


def test_earlier_tokens_serve_the_runs_that_began_with_them_alone(
    text: Path, tok: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(input_file=str(text), tokenizer=str(tok))
    digest = made_before(text, tok, cache, monkeypatch)
    new = prepare_cached(data)
    assert new.digest != digest
    assert new.train[0] == FIRST
    assert prepare_cached(data, begun_with=digest).digest == digest
    (text.parent / "texts").mkdir()
    text = text.rename(text.parent / "texts" / "text.txt")
    digest = made_before(text.parent, tok, cache, monkeypatch)
    text.with_name("more.txt").write_text("more")
    tokens, changed = prepare_again(data.changed(input_file=str(text.parent)), digest)
    assert (tokens.digest, changed) == (digest, f"{text.parent} has changed since this run began")


def test_a_model_of_an_earlier_release_is_used_and_exported_without_it(tok: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    before = as_before(tok)
    assert (before.begin_of_text, before.prompt_ids("")) == (None, [before.end_of_text])
    assert before.text_digest == load_tokenizer(str(tok)).text_digest != load_tokenizer(str(tok)).digest
    out = tmp_path / "out"
    out.mkdir()
    for name, content in tokenizer_files(before).items():
        (out / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(out, local_files_only=True)
    assert theirs("The cat")["input_ids"] == before.prompt_ids("The cat")
    assert load_tokenizer(str(out)).begin_of_text is None
    ids = load_tokenizer(str(out)).encode(TEXT).tolist()
    assert ids == before.encode(TEXT).tolist()


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_run: Any, tok: Path) -> Callable[..., LoadedModel]:
    """A factory of models with this tokenizer."""

    def make(tokenizer: Tokenizer | None = None) -> LoadedModel:
        shutil.rmtree("tiny", ignore_errors=True)
        return scalegpt.load(tiny_run(tokenizer=tokenizer or load_tokenizer(str(tok)), n_embd=8), device="cpu")

    return make


@torch.no_grad()
def nats(model: LoadedModel, ids: list[int]) -> float:
    logits = torch.cat([model.model(torch.tensor([ids[:place]])) for place in range(1, len(ids))])
    return F.cross_entropy(logits.double(), torch.tensor(ids[1:]), reduction="sum").item()


def test_a_text_is_scored_after_it_also_by_a_model_of_packed_documents(model: Callable[..., Any]) -> None:
    loaded = model()
    Path("short.txt").write_text("The cat")
    ids = [FIRST, *loaded.tokenizer.encode("The cat").tolist()]
    for end in (None, loaded.tokenizer.end_of_text):
        loaded.model.set_packing(end)
        result = loaded.evaluate("short.txt")
        assert (result.tokens, result.bytes) == (len(ids) - 1, 7)
        loaded.model.set_packing(None)
        assert result.nats == pytest.approx(nats(loaded, ids), rel=1e-6)
        assert result.bits_per_byte == pytest.approx(result.nats / math.log(2) / 7)


def test_prepared_tokens_count_the_bytes_of_the_text_alone(model: Callable[..., Any], text: Path, tok: Path) -> None:
    tokens = prepare([text], Path("tokens"), DataConfig(tokenizer=str(tok), val_fraction=0.1))
    size = sum(model().evaluate("tokens", split=split).bytes for split in ("train", "val"))
    assert size == len(TEXT.encode())
    assert tokens.tokenizer.begin_of_text == FIRST


def test_a_prompt_is_continued_after_it(model: Callable[..., Any], tok: Path) -> None:
    loaded, before = model(), model(as_before(tok))
    assert loaded.prompt_ids("The cat") == [FIRST, *before.prompt_ids("The cat")]
    assert (loaded.prompt_ids(""), before.prompt_ids("")) == ([FIRST], [before.tokenizer.end_of_text])
    assert "begin_of_text" not in loaded.generate("The cat", max_new_tokens=4)


def test_samples_of_a_run_begin_after_it_and_do_not_show_it(call: Callable[..., str], text: Path, tok: Path) -> None:
    flags = {
        "n_layer": 1, "n_embd": 8, "n_head": 1, "block_size": 16, "max_iters": 1, "micro_batch": 2, "tokens_per_step": 32,
        "warmup_steps": 0, "eval_tokens": 32, "sample_tokens": 4, "sample_prompt": "The cat", "device": "cpu",
        "precision": "fp32", "input_file": text, "tokenizer": tok, "model_name": "run", "preset": "tiny",
    }  # fmt: skip
    call("train", *(word for key, value in flags.items() for word in (f"--{key}", str(value))))
    assert "\nThe cat" in Path("runs/run/samples.txt").read_text()
    assert scalegpt.load("runs/run", device="cpu").tokenizer.begin_of_text == FIRST
    assert load_tokenizer("runs/run").begin_of_text == FIRST
