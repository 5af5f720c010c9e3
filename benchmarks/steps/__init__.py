"""Training steps, ours and a plain nanoGPT-style loop's, made ready to be timed."""
