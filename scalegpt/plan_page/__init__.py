"""How a plan is shown: in words, in sections of HTML with charts, and as a page that plans in the browser.

``wording.py`` has the words that all outputs share. ``page.py`` (read first) draws the sections of ``scalegpt plan --html``;
``curves.py``, ``region.py`` and ``scaling.py`` draw those that vary a plan. ``form.py`` writes the page that plans in the
browser, and ``browser.py`` answers it. May import :mod:`scalegpt.planner` and everything below it; needs no package but
PyYAML, since Python in a browser has no other.
"""
