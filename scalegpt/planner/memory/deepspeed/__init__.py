"""DeepSpeed's part of the ledger: the memory of its optimizers, and its complete settings, which the trainer uses too.

Start with ``stages_0_to_2``; ``settings`` completes a DeepSpeed configuration.
"""
