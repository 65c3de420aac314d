"""What launch/analyze.py does: open the runs, measure what is missing, draw, and put it together."""

from dataclasses import replace
from pathlib import Path

from sorsa_ds.runtime.console import say
from sorsa_ds.runtime.folder_lock import at_work_in
from sorsa_ds.runtime.memory import free_memory
from sorsa_ds.study.analysis import figures, report
from sorsa_ds.study.analysis.compute import compute, missing, workers_for
from sorsa_ds.study.analysis.request import Options, Request, opened
from sorsa_ds.study.analysis.table import Table

TABLE = "measures.csv"


def analyze(options: Options) -> Path:
    """Fill the folder `options.output`, or go on with it; returns the report's file.

    Raises:
        ValueError: a bad option, a run that is unfinished or damaged, a folder that is in use, holds another analysis
            or cannot be written.
    """
    request = opened(options)
    with at_work_in(request.output):
        request.settle()
        return _written(request, _measured(request))


def _measured(request: Request) -> Table:
    """The table with all rows of all runs."""
    table, options = Table(request.output / TABLE), request.options
    jobs = [
        job
        for run in request.runs
        for job in missing(run.folder, options.base, run.name, run.history, table, options.dtype, request.rank)
    ]
    if jobs:
        compute(jobs, table, options.workers or workers_for(jobs, free_memory()))
        table.sort()
    return table


def _written(request: Request, table: Table) -> Path:
    runs = [replace(run, rows=run.rows_of(table)) for run in request.runs]
    pictures = figures.draw(runs, request.output)
    written = report.write(runs, pictures, request.rank, request.options.dtype, request.output)
    say(f"{table.path}\n{written}")
    return written
