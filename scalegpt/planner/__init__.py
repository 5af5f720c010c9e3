"""The planner: what a GPT costs, by arithmetic alone.

Nothing here imports torch or numpy, so that a command can answer in milliseconds, on a machine without a GPU.
"""
