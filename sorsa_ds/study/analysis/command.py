"""The way of an analysis: open the runs, measure what is missing, draw the figures, and write the report."""

from dataclasses import replace
from pathlib import Path

from sorsa_ds.runtime.console import say
from sorsa_ds.runtime.folder_lock import at_work_in
from sorsa_ds.runtime.memory import free_memory
from sorsa_ds.study.analysis import figures, report
from sorsa_ds.study.analysis.compute import compute, missing_jobs, workers_for
from sorsa_ds.study.analysis.options import Options
from sorsa_ds.study.analysis.request import Request, open_request
from sorsa_ds.study.analysis.table import Table

TABLE = "measures.csv"


def analyze(options: Options) -> Path:
    """Fill the folder `options.output`, or go on with it; returns the path of the report.

    Raises:
        ValueError: an option is bad, a run is unfinished or damaged, or the folder is in use, holds another analysis or
            cannot be written.
    """
    request = open_request(options)
    with at_work_in(request.output):
        request.claim_output()
        return _written(request, _measured(request))


def _measured(request: Request) -> Table:
    """The table with all rows of all runs."""
    table, options = Table(request.output / TABLE), request.options
    jobs = [
        job
        for run in request.runs
        for job in missing_jobs(run.folder, options.base, run.name, run.history, table, options.dtype, request.rank)
    ]
    if jobs:
        compute(jobs, table, options.workers or workers_for(jobs, free_memory()))
        table.sort()
    return table


def _written(request: Request, table: Table) -> Path:
    runs = [replace(run, rows=run.rows_of(table)) for run in request.runs]
    pictures = figures.draw_figures(runs, request.output)
    written = report.write_report(runs, pictures, request.rank, request.options.dtype, request.output)
    say(f"{table.path}\n{written}")
    return written
