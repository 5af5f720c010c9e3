"""Entries of the data ledger, for tests."""

from scalegpt.data.windows.ledger import LedgerFile, LedgerSource, Stretch
from scalegpt.inputs import MIXTURE_BLOCK


def of_one_file(
    step: int, window: int, per_step: int, block: int, seed: int, tokens: int, file: str, data: str, reason: str
) -> Stretch:
    """An entry whose data are one source in one file."""
    source = LedgerSource(file, MIXTURE_BLOCK, tokens, data, (LedgerFile(file, 0, tokens),))
    return Stretch(step, window, per_step, block, seed, data, reason, (source,))
