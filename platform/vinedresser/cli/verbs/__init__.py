"""The verbs of the command line, one per file: its arguments and what it does with them."""
