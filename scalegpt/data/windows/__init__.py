"""Which windows a run trains on: its sources and their weights, the order of the windows, the ledger of what was consumed."""
