"""Several runs side by side: `analysis` shows how training moved the weights of runs, `compare` trains several methods.

Start reading at `analysis.command.analyze` and `compare.command.compare`, the two commands.
"""
