"""Tokens as releases made them that ended no training text with end-of-text."""

import hashlib
import json
from pathlib import Path

from scalegpt.data.shards import open_tokens


def made_before(text: Path, cache: Path) -> str:
    """Put the entry that the release before made of a text into the cache; return its digest."""
    content = text.read_bytes()
    identity = {
        "version": 1,
        "tokenizer": "byte",
        "encoding": "utf-8",
        "val_fraction": None,
        "sources": [(text.name, hashlib.sha256(content).hexdigest())],
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    ids = [*content, 256]
    cut = int(len(ids) * 0.9)
    parts = {"train": ids[:cut], "val": ids[cut:]}
    written = {name: b"".join(token.to_bytes(2, "little") for token in part) for name, part in parts.items()}
    meta = {
        "format": "scalegpt-tokens", "version": 1, "dtype": "uint16", "key": key, "tokenizer": {"kind": "byte"},
        "sources": [], "documents": 1, "skipped": {}, "encoding": "utf-8",
        **{f"{name}_tokens": len(part) for name, part in parts.items()},
        "files": {name: hashlib.sha256(part).hexdigest() for name, part in written.items()},
    }  # fmt: skip
    folder = cache / key
    folder.mkdir(parents=True)
    for name, part in written.items():
        (folder / f"{name}.bin").write_bytes(part)
    (folder / "meta.json").write_text(json.dumps(meta))
    return open_tokens(folder).digest
