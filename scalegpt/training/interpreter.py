"""What Python itself does between the lines of the loop."""

import gc


def spare_the_collector() -> None:
    """Let the garbage collector pass over what is there after the first step: it all lives as long as the run.

    A full collection looks at every object, which takes tenths of a second in the middle of a step, on one rank at a time.
    """
    gc.collect()
    gc.freeze()


def unspare() -> None:
    """Let it look at everything again."""
    gc.unfreeze()
