"""Models of other programs: their configurations, read and written."""
