"""Token files of other programs, read as they are: llm.c, Megatron, datatrove. Each format has a module.

:mod:`~scalegpt.data.foreign.table` recognises them, :mod:`~scalegpt.data.foreign.opening` opens them.
"""
