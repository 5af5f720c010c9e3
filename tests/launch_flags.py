"""A small run for the tests of launchers: its text, and its flags but those of the layout."""

TEXT = "\n".join(f"{i} green bottles hanging on the wall, and if one should fall, {i - 1} are left" for i in range(400))
SHAPE = [
    "--tokenizer", "byte", "--vocab-size", "auto", "--n_layer", "2", "--n_embd", "32", "--n-head", "2",
    "--block_size", "32", "--device", "cpu", "--seed", "3", "--learning_rate", "1e-2", "--warmup_steps", "2",
    "--tokens_per_step", "512", "--eval_every", "5", "--checkpoint_every", "5", "--sample_tokens", "8",
    "--eval_tokens", "512", "--precision", "fp32",
]  # fmt: skip
