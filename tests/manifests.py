"""Manifests as somebody else might write them, digest and all; written from docs/CHECKPOINTS.md, not with our own code."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def sealed(document: dict[str, Any]) -> bytes:
    """The document with its digest."""
    bare = {key: value for key, value in document.items() if key != "sha256"}
    return canonical({**bare, "sha256": hashlib.sha256(canonical(bare)).hexdigest()})


def rewrite(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a checkpoint's manifest in place, and make its digest agree."""
    path = checkpoint / "checkpoint.json"
    document = json.loads(path.read_bytes())
    change(document)
    path.write_bytes(sealed(document))
