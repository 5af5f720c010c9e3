"""The single description of a decoder: its parts, their parameters, and the operations that they run. No torch.

Start with :mod:`~scalegpt.architecture.decoder`: a model configuration becomes parts in order. A part
(:mod:`~scalegpt.architecture.parts`) names its parameters and records its operations on a
:class:`~scalegpt.architecture.operations.Recorder`. An operation states its FLOPs, the bytes that it moves, the kernels that
it starts, the tensors that autograd keeps for its backward pass, and the temporary memory of its kernels.

The modules of :mod:`scalegpt.model` are built from the same configuration, part by part. The planner derives parameter
counts, the memory of a step and the work of a step from this package. It may import :mod:`scalegpt.config` and
:mod:`scalegpt.errors`.
"""
