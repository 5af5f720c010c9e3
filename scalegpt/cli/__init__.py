"""The commands. Each module reads arguments, calls, prints; no logic lives here."""
