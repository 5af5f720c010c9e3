"""What a run prints: its messages and steps, with a live line on a terminal, and a summary at its end."""
