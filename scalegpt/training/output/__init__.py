"""What a run prints: its messages and steps, with a live line on a terminal, and what it says at its end."""
