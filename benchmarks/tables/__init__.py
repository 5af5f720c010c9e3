"""The tables of the documents that presets, catalogue and planner decide; ``benchmarks/generate_tables.py`` writes them."""
