"""Reading the text that users give: finding the files, recognising their formats, detecting their encodings.

Read ``corpus`` first. May import :mod:`scalegpt.config` and what lies below it, :mod:`scalegpt.data.tokenizers`, and numpy.
"""
