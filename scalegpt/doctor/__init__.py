"""The checks of ``scalegpt doctor``: what on this machine would keep a run from starting, slow it down or end it.

Start with ``checks``, which registers and runs them; each other module holds the checks of one subject. May import
everything below :mod:`scalegpt.cli`; a check imports torch itself, so that a broken torch is a finding too.
"""
