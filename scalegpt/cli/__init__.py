"""The command line: one module for each command, which reads arguments and prints text, without logic of its own.

Read ``main.py`` first, then ``parser.py`` (how flags are read) and ``output.py`` (how text is printed). May import
everything. A command imports torch only inside the functions that need it.
"""
