"""What launch/analyze.py does: open the runs, measure what is missing, draw, and put it together."""

from pathlib import Path

from sorsa_ds.analysis import figures, report
from sorsa_ds.analysis.compute import compute, missing, workers_for
from sorsa_ds.analysis.request import Options, opened
from sorsa_ds.analysis.runs import Run
from sorsa_ds.analysis.table import Table
from sorsa_ds.console import say
from sorsa_ds.preflight.facts import free_memory

TABLE = "measures.csv"


def analyze(options: Options) -> Path:
    """Fill the folder `options.output`, or go on with it; returns the report's file.

    Raises:
        ValueError: as `request.opened` and `compute.compute`, or the folder cannot be written.
    """
    request = opened(options)
    output = request.output
    table = Table(output / TABLE)
    jobs = [
        job
        for name, (folder, history) in request.runs.items()
        for job in missing(folder, options.base, name, history, table, options.dtype, request.rank)
    ]
    if jobs:
        workers = options.workers or workers_for(jobs, free_memory())
        compute(jobs, table, workers)
        table.sort()
    runs = [
        Run.of(name, folder, history, [row for row in table.rows.values() if row.key.run == name])
        for name, (folder, history) in request.runs.items()
    ]
    pictures = figures.draw(runs, output)
    written = report.write(runs, pictures, request.rank, options.dtype, output)
    say(f"{output / TABLE}\n{written}")
    return written
