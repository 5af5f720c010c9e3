"""Whether a run goes on with the tokens that it was trained on."""

import json
from collections.abc import Set
from pathlib import Path

from scalegpt.checkpoint.manifest import Header
from scalegpt.config import RunConfig
from scalegpt.config.run import DATA
from scalegpt.data.ledger import Stretch
from scalegpt.data.shards import TokenSet
from scalegpt.data.tokenizers import Tokenizer
from scalegpt.errors import InputError
from scalegpt.training.runs.changes import allow_change


def other_tokens(header: Header, data: TokenSet, digest: str, before: Stretch | None) -> dict[str, str]:
    """How tokenizer and tokens differ from those that a checkpoint was trained on, each as ``old → new``."""
    others = {}
    if json.dumps(header.tokenizer, sort_keys=True) != json.dumps(data.tokenizer.as_dict(), sort_keys=True):
        old, new = Tokenizer.from_dict(header.tokenizer), data.tokenizer
        others["tokenizer"] = f"{old.kind} {old.digest[:12]} → {new.kind} {new.digest[:12]}"
    if header.data not in {None, digest}:
        others[DATA] = f"{str(header.data)[:12]} → {digest[:12]}"
        if before is not None and before.tokens != len(data.train):
            others[DATA] += f", {data.files['train'].path} of {before.tokens:,} → {len(data.train):,} tokens"
    return others


def check_tokens(checkpoint: Path, run: RunConfig, allowed: Set[str], others: dict[str, str]) -> None:
    """Refuse to go on with other tokens than a checkpoint was trained on.

    Args:
        checkpoint: the one to go on from.
        run: as it is to go on.
        allowed: what may differ.
        others: what does.

    Raises:
        InputError: shows the differences between their digests.
    """
    forbidden = others.keys() - allowed
    if forbidden:
        told = ", ".join(f"{key}: {change}" for key, change in others.items() if key in forbidden)
        raise InputError(
            f"{checkpoint} was trained on other tokens than {run.data.input_file} gives ({told}); use the data it was "
            f"trained on; or {allow_change(others, allowed)} goes on with these; or another --model_name, or --fresh to "
            "start anew beside it"
        )
