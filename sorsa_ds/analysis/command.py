"""What launch/analyze.py does: open the runs, measure what is missing, draw, and put it together."""

from pathlib import Path

from sorsa_ds.analysis import figures, report
from sorsa_ds.analysis.compute import compute, missing, workers_for
from sorsa_ds.analysis.request import Options, Request, opened
from sorsa_ds.analysis.runs import Run
from sorsa_ds.analysis.table import Table
from sorsa_ds.console import say
from sorsa_ds.preflight.facts import free_memory
from sorsa_ds.run_lock import RunLock

TABLE = "measures.csv"


def analyze(options: Options) -> Path:
    """Fill the folder `options.output`, or go on with it; returns the report's file.

    Raises:
        ValueError: a bad option, a run that is unfinished or damaged, a folder that is in use, holds another analysis
            or cannot be written.
    """
    request = opened(options)
    try:
        request.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output: {request.output} cannot be made ({error.strerror})") from error
    lock = RunLock(request.output)
    lock.acquire()
    try:
        request.settle()
        return _written(request, _measured(request))
    finally:
        lock.release()


def _measured(request: Request) -> Table:
    """The table with all rows of all runs."""
    table, options = Table(request.output / TABLE), request.options
    jobs = [
        job
        for name, (folder, history) in request.runs.items()
        for job in missing(folder, options.base, name, history, table, options.dtype, request.rank)
    ]
    if jobs:
        compute(jobs, table, options.workers or workers_for(jobs, free_memory()))
        table.sort()
    return table


def _written(request: Request, table: Table) -> Path:
    runs = [
        Run.of(name, folder, history, [row for row in table.rows.values() if row.key.run == name])
        for name, (folder, history) in request.runs.items()
    ]
    pictures = figures.draw(runs, request.output)
    written = report.write(runs, pictures, request.rank, request.options.dtype, request.output)
    say(f"{table.path}\n{written}")
    return written
