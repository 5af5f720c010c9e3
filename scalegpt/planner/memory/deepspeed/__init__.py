"""DeepSpeed's part of the memory: what its optimizers hold, and its complete settings, which the trainer uses too.

Start with ``stages_0_to_2``; ``settings`` completes a DeepSpeed configuration.
"""
