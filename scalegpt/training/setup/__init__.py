"""Turns a request into a job, in stages. Each stage is a frozen object, made by one function from earlier stages.

=============  =============================  ======================================================================
stage          made by                        decides or adds
=============  =============================  ======================================================================
``Request``    ``request.Request.of``         the configuration, and which settings the user named
``Resolved``   ``resolve.resolve_request``    precision, compiling, expected vocabulary, what earlier processes chose
``Planned``    ``planning.choose_layout``     micro batch, recompute, backend, stage, offload, loss; the prediction
``ReadyData``  ``data.prepare_data``          the tokens, their tokenizer and vocabulary
``Start``      ``directory.open_run``         the run's folder, locked, and the checkpoint to resume from
``Job``        ``prepare.prepare``            the backend and its model, with their state loaded
=============  =============================  ======================================================================

The layout is planned before the data are prepared, so that a run that cannot fit is refused before hours of
preparation. The vocabulary is known by then, except for tokens that are the characters of a text. Such a run is planned
again if its text has another number of distinct characters than expected.

Start with ``prepare``. This package may import :mod:`scalegpt.training.job`, ``resilience``, ``runs`` and every layer below
training.
"""
