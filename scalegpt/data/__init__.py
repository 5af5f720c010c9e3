"""Text to tokens, and tokens to training windows: tokenizers, corpus, prepare, shards, sampler. No torch in here."""
