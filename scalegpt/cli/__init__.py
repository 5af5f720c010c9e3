"""The command line: one module for each command, arguments in, text out; no logic.

Read ``main.py`` first, then ``parser.py`` (how flags are read) and ``output.py`` (how text is printed). May import
everything; a command imports torch only where it needs it.
"""
