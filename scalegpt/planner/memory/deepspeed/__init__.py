"""DeepSpeed in the memory prediction, and DeepSpeed's complete settings, which the trainer uses too.

Start with ``stages_0_to_2``; ``settings`` completes a DeepSpeed configuration.
"""
