"""The torch model, its loss, recompute and generation. No module here knows of ranks."""
