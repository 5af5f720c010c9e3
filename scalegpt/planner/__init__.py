"""The planner: it computes the memory and the time of training a GPT by arithmetic alone.

Nothing here imports torch or numpy, so a command can answer in milliseconds, on a machine without a GPU.
"""
