"""Several runs side by side: `analysis` shows how training moved the weights of runs, `compare` trains several methods,
`runs` lists what runs there are.

Start reading at `analysis.command.analyze`, `compare.command.compare` and `runs.command.list_runs`, the commands.
"""
