"""Tables for the documents, made from presets, catalogue and planner; ``benchmarks/generate_tables.py`` writes them."""
