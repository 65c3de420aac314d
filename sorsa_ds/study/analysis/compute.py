"""All linears and steps of all runs are measured in processes of one thread each; each result becomes a row."""

import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from traceback import clear_frames

import torch

from sorsa_ds.model.targets import Target
from sorsa_ds.runtime.console import bar
from sorsa_ds.study.analysis import measures
from sorsa_ds.study.analysis.history import History, open_history
from sorsa_ds.study.analysis.measures import Spectrum
from sorsa_ds.study.analysis.table import Figures, Key, Row, Table, block_of

MATRICES = 16
"""The most matrices of a weight's size that a process holds at once: 13 were seen in float64, and merging adds more."""


@dataclass(frozen=True, slots=True)
class Job:
    """One linear of a run, to be measured at some steps.

    run: the run's folder.
    base: the base model's place, where it has moved.
    name: the run's name in the table.
    shape: the shape of the linear's weight, (out_features, in_features).
    dtype: the dtype of the decompositions, by PyTorch's name.
    rank: the rank of the leading subspaces that are compared.
    trust_remote_code: whether code of the base model is allowed.
    beside: the number of experts in the linear's parameter, which are merged at once; 0: the linear is no expert's.
    """

    run: Path
    base: str | None
    name: str
    linear: str
    steps: tuple[int, ...]
    shape: tuple[int, int]
    dtype: str
    rank: int
    trust_remote_code: bool = False
    beside: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices that a process holds at once: in fp32 the weights that are merged with it, twice."""
        one = self.shape[0] * self.shape[1]
        return one * (MATRICES * getattr(torch, self.dtype).itemsize + 2 * 4 * self.beside)

    @property
    def cost(self) -> float:
        """The cost of one step, in proportion to the flops of a decomposition."""
        return float(self.shape[0] * self.shape[1] * min(self.shape))

    def key(self, step: int) -> Key:
        """The key of the row of one step."""
        return Key(self.name, block_of(self.linear), self.linear, step)


def missing_jobs(
    run: Path, base: str | None, name: str, history: History, table: Table, dtype: str, rank: int
) -> list[Job]:
    """One job per linear of a run, for the steps that are not in the table yet."""
    jobs = []
    for target in history.linears:
        shape, code = (target.out_features, target.in_features), history.source.trust_remote_code
        beside = history.stacks[target.name][0].experts if target.name in history.stacks else 0
        whole = Job(run, base, name, target.name, (), shape, dtype, rank, code, beside)
        steps = tuple(step for step in history.steps if whole.key(step) not in table.rows)
        if steps:
            jobs.append(replace(whole, steps=steps))
    return jobs


def workers_for(jobs: Sequence[Job], free: int) -> int:
    """The number of processes that there are cores, jobs and bytes of free memory for."""
    largest = max(job.nbytes for job in jobs)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, len(jobs), free // largest))


def compute(jobs: list[Job], table: Table, workers: int) -> None:
    """Measure everything, the most expensive jobs first. A row counts as done when it is on the disk.

    Raises:
        ValueError: a run, its base model or a snapshot is damaged, or the system has killed a process. The rows that
            were measured before are kept.
    """
    try:
        _compute(jobs, table, workers)
    except BaseException as error:
        # The command leaves without unwinding, and semaphores are freed only with the frames that refer to them.
        clear_frames(error.__traceback__)
        if isinstance(error, BrokenProcessPool):
            raise ValueError(
                "a process was killed, for memory perhaps: fewer --workers; the same command goes on where it was"
            ) from error
        raise


def _compute(jobs: list[Job], table: Table, workers: int) -> None:
    # Processes are forked from a server that has imported everything and computed nothing, so it has no other thread.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    rows = context.SimpleQueue()
    stay, leave = context.Pipe(duplex=False)
    total = sum(job.cost * len(job.steps) for job in jobs)
    jobs = sorted(jobs, key=lambda job: job.cost * len(job.steps), reverse=True)
    costs = {job.key(step): job.cost for job in jobs for step in job.steps}
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(rows, stay))

    def job_is_over(_: Future) -> None:
        if not leave.closed:
            rows.put(None)

    try:
        futures = [pool.submit(_work, job) for job in jobs]
        for future in futures:
            future.add_done_callback(job_is_over)
        with bar(total, f"decomposing on {workers} processes", "%") as shown:
            for row in _arriving(rows, futures):
                table.append(row)
                shown.update(costs[row.key])
    finally:
        leave.close()
        pool.shutdown(cancel_futures=True)


def _arriving(rows: SimpleQueue, futures: Sequence[Future]) -> Iterator[Row]:
    """The rows as they come, until every job is over. What the first failing job has raised is raised here."""
    for _ in futures:
        while (row := rows.get()) is not None:
            yield row
        for future in futures:
            if future.done():
                future.result()


def measure_linear(
    history: History, target: Target, steps: Iterable[int], dtype: torch.dtype, rank: int
) -> Iterator[tuple[int, Figures]]:
    """(step, figures) of one linear at each of the steps; the matrix of the start is decomposed once.

    Raises:
        ValueError: a snapshot is damaged, the base model is not the one that was trained on, or a weight has no
            decomposition.
    """
    start = _spectrum(history, target, 0, dtype)
    for step in steps:
        now = start if step == 0 else _spectrum(history, target, step, dtype)
        turn = measures.turn(now, start, rank)
        factors = history.factors(target, step)
        of_factors: list[float | None] = [None] * 4
        if factors is not None:
            sides = [factor.to(dtype) for factor in (factors.U, factors.V)]
            of_factors = [measures.condition(torch.linalg.svdvals(side)) for side in sides]
            of_factors += [measures.orthonormality(side) for side in sides]
        condition_u, condition_v, orthonormality_u, orthonormality_v = of_factors
        yield step, Figures(
            measures.delta_sigma(now, start), turn.literal, turn.matched, turn.clustered, turn.subspace,
            turn.swapping, measures.condition(now.s), condition_u, condition_v, orthonormality_u, orthonormality_v,
            measures.effective_rank(now.s), measures.stable_rank(now.s),
        )  # fmt: skip


def _spectrum(history: History, target: Target, step: int, dtype: torch.dtype) -> Spectrum:
    weight = history.weight(target, step).to(dtype)
    what = f"{history.run}: {target.name} at step {step}"
    if not weight.isfinite().all():
        raise ValueError(f"{what} has entries that are NaN or infinite")
    try:
        return Spectrum.of(weight)
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"{what} cannot be decomposed ({error})") from error


_opened = lru_cache(maxsize=1)(open_history)
_rows: SimpleQueue | None = None


def _begin(rows: SimpleQueue, stay: Connection) -> None:
    """Prepare a new process: it uses one thread, and ends when its parent ends or closes the other end of `stay`."""
    global _rows
    _rows = rows
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, args=(stay,), daemon=True).start()


def _leave_with_parent(stay: Connection) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a child process waits for its parent"
    wait([parent.sentinel, stay])
    os._exit(1)


def _work(job: Job) -> None:
    assert _rows is not None, "the process was prepared by _begin"
    history = _opened(job.run, job.base, job.trust_remote_code)
    [target] = [target for target in history.linears if target.name == job.linear]
    for step, figures in measure_linear(history, target, job.steps, getattr(torch, job.dtype), job.rank):
        _rows.put(Row(job.key(step), figures))
