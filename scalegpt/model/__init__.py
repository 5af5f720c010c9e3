"""The model, its loss, and what it recomputes. Nothing here knows of ranks."""
