"""The training loop and what it needs: optimizer, schedule, batches, metrics, loggers."""
