"""From a request to a job, in stages: each a frozen object, made by one function from the stages before it.

=============  =============================  ======================================================================
stage          made by                        what it settles
=============  =============================  ======================================================================
``Request``    ``request.Request.of``         what is asked, and which settings the user named
``Resolved``   ``resolve.resolve_request``    precision, compiling, expected vocabulary, what earlier processes chose
``Planned``    ``planning.choose_layout``     micro batch, recompute, backend, stage, offload, loss; the prediction
``ReadyData``  ``data.prepare_data``          the tokens, their tokenizer and vocabulary
``Start``      ``directory.open_run``         the run's folder, locked, and the checkpoint that it resumes from
``Job``        ``prepare.prepare``            the model in its backend, loaded
=============  =============================  ======================================================================

The layout is planned before the data are prepared, so that a run that cannot fit is refused before hours of preparation. The
vocabulary is known by then, except that of the characters of a text: such a run is planned once more where its text has
other than the expected number of characters.

Start with ``prepare``. May import :mod:`scalegpt.training.job`, ``resilience``, ``runs`` and what lies below training.
"""
