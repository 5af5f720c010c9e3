"""Where the ranks of a restarted job meet: at a store in which the dead of the last start have left their addresses.

torchrun keeps one store for all restarts (torch's ``rendezvous.py`` says that there is a new one for each; with the c10d
rendezvous, which is the default, there is not). A rank that comes early reads where its neighbour was before the restart,
and fails with "Connection refused". The count of restarts does not tell the starts apart, since agents on several machines
count for themselves. So the ranks that are there now find each other first, and then use a corner of the store of their own.
"""

import secrets
import time
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store

from scalegpt.errors import RunError

POLL_SECONDS = 0.05


def meet(store: Store, rank: int, size: int, timeout: timedelta) -> Store:
    """A corner of the store that no earlier start has used; all ranks must call it together.

    Each rank leaves a number that nobody else has; rank 0 answers to the number with the name of its start, until all that
    are there now have read that.

    Raises:
        RunError: a rank does not come.
    """
    if rank:
        number = secrets.token_hex(8)
        store.set(f"scalegpt/hello/{rank}", number)
        store.wait([f"scalegpt/welcome/{number}"], timeout)
        name = store.get(f"scalegpt/welcome/{number}").decode()
        store.set(f"scalegpt/here/{name}/{rank}", "")
        return PrefixStore(f"scalegpt/{name}", store)
    name, missing = secrets.token_hex(8), set(range(1, size))
    until = time.monotonic() + timeout.total_seconds()
    while missing:
        for each in missing:
            if store.check([f"scalegpt/hello/{each}"]):  # perhaps a dead one's: nobody will read the answer
                store.set(f"scalegpt/welcome/{store.get(f'scalegpt/hello/{each}').decode()}", name)
        missing = {each for each in missing if not store.check([f"scalegpt/here/{name}/{each}"])}
        if time.monotonic() > until:
            raise RunError(f"ranks {sorted(missing)} did not come within {timeout}; see what their processes say")
        time.sleep(POLL_SECONDS)
    return PrefixStore(f"scalegpt/{name}", store)
