"""Training steps that benchmarks time: those of our trainer, and those of a plain nanoGPT-style loop."""
