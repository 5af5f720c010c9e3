"""ScaleGPT: plans the memory of a GPT training run, then trains it with FSDP2 or DeepSpeed ZeRO."""

__version__ = "0.1.0"
