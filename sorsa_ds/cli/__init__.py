"""The commands, one module each, as launch/*.py start them.

Each has a `main(argv)` that does not return: it ends the process with the exit codes of `runtime.exit_codes`. Modules
that take seconds to import are imported after the command line has been read, so that a mistake in it is reported at
once.
"""
