"""What a decoder is made of, said once: its parts, their parameters, and the operations that they run. No torch.

Start with :mod:`~scalegpt.architecture.decoder`: a model configuration becomes parts in order. A part
(:mod:`~scalegpt.architecture.parts`) names its parameters and records its operations on a
:class:`~scalegpt.architecture.operations.Recorder`. An operation says what it computes (FLOPs), what it moves (bytes,
kernels), what autograd keeps of it, and what it needs for a while.

The modules of :mod:`scalegpt.model` are built from the same configuration, part by part. The planner derives parameter
counts, the memory of a step and its work from here. May import :mod:`scalegpt.config` and :mod:`scalegpt.errors`.
"""
