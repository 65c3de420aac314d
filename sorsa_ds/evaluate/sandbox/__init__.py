"""Programs that a model wrote are run here, where they can do no harm. Start reading at `runner.Sandbox`.

    runner (the evaluation's process) -> jail (a child: trusted, walls itself in) -> program (its child: not trusted)

The jail and the program are started by the paths of their files and use the standard library alone.
"""
