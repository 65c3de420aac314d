"""Programs that a model wrote, run where they can do no harm.

    runner (the evaluation's process) -> jail (a child: trusted, walls itself in) -> program (its child: not trusted)

jail.py and program.py are run by their paths, with the standard library alone.
"""
