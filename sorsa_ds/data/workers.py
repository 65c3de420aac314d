"""Tokenising many rows, in several processes where they are many enough to pay for starting those.

The processes are forked by a server that ends with them, and not by this process: that may have threads, and a GPU in
use, which a fork does not survive. They import this module and not the program that is run, which may be a script
that would do all of its work again. A process that renders conversations has a child of its own for that (`chat`), with
the limits that every template has.
"""

import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import BaseContext, ForkServerContext, ForkServerProcess
from types import ModuleType
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sorsa_ds.config.schema import DataConfig
from sorsa_ds.data.layout import Layout
from sorsa_ds.data.tokenize import ROWS_PER_CALL, Encoded, Encoder, RowError, encode_rows
from sorsa_ds.runtime.console import bar

FEWEST_ROWS = 10_000
"""Fewer rows are tokenised in this process: to start others takes longer."""

MOST_PROCESSES = 16

_encoder: Encoder | None = None
"""That of this process, where it is a worker."""


def encode_in_parts(
    rows: Dataset, data: DataConfig, encoder: Encoder, place_of: Callable[[int], str]
) -> Iterator[Encoded]:
    """Tokenise rows part by part, in their order, behind a progress bar.

    Args:
        data: the settings that gave the encoder.
        place_of: the file in which a row, counted from 0, stands, and where in it; empty where that is not known.

    Raises:
        ValueError: a row cannot be rendered or is longer than allowed, or the system has not started a process or has
            ended one.
    """
    processes = min(MOST_PROCESSES, len(os.sched_getaffinity(0)), len(rows) // ROWS_PER_CALL)
    columns, rows = rows.column_names, _needed(rows, encoder.layout)
    alone = len(rows) < FEWEST_ROWS or processes < 2 or not _can_be_sent(encoder.tokenizer)
    with bar(len(rows), "tokenising", "row", hidden=len(rows) <= ROWS_PER_CALL) as progress:
        try:
            for part in _here(rows, encoder) if alone else _in_workers(rows, data, columns, encoder, processes):
                yield part
                progress.update(len(part.examples) + part.left_out.total())
        except RowError as error:
            raise error.at(place_of(error.number - 1)) from error
        except OSError as error:  # which would be taken for one of writing what is tokenised
            raise ValueError(f"{encoder.what}: a process for it cannot be started or reached: {error}") from error


def _can_be_sent(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether another process can be given the tokenizer: it knows no classes of a model's own code."""
    return type(tokenizer).__module__.startswith("transformers.")


def _here(rows: Dataset, encoder: Encoder) -> Iterator[Encoded]:
    for start in range(0, len(rows), ROWS_PER_CALL):
        yield encode_rows(_part(rows, start), start, encoder)


def _in_workers(
    rows: Dataset, data: DataConfig, columns: list[str], encoder: Encoder, processes: int
) -> Iterator[Encoded]:
    """The parts as workers make them. Only as many are under way as keep the workers busy."""
    given = (data, columns, encoder.tokenizer, encoder.what)
    under_way: deque[Future[Encoded]] = deque()
    with _server() as context, _pool(processes, context, given) as pool:
        try:
            for start in range(0, len(rows), ROWS_PER_CALL):
                under_way.append(pool.submit(_encode, _part(rows, start), start))
                if len(under_way) > 2 * processes:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool as error:
            raise ValueError(
                f"{encoder.what}: a process that tokenises rows was ended, most likely for want of memory ({error})"
            ) from error


def _needed(rows: Dataset, layout: Layout) -> Dataset:
    """The rows without columns that are not looked at. A conversation's template may look at any."""
    if layout.format == "chat" or (layout.format == "completion" and layout.prompt is None):
        return rows
    written = layout.prompt.columns if layout.prompt else ()
    needed = {*layout.columns.values(), *layout.refused, *written}
    return rows.select_columns([column for column in rows.column_names if column in needed])


def _part(rows: Dataset, start: int) -> list[dict]:
    """The rows of one call, as they are."""
    columns = rows[start : start + ROWS_PER_CALL]
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


@contextmanager
def _pool(processes: int, context: BaseContext, given: tuple) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(processes, context, _start, given)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _server() -> Iterator[BaseContext]:
    """A context whose processes are forked by a server, which has imported this module, and which ends with it.

    A server that was there before is used as it is, and stays.
    """
    server: Any = forkserver._forkserver  # Python has no public way to end it
    was_there, preloaded = server._forkserver_pid is not None, server._preload_modules
    forkserver.set_forkserver_preload([__name__])
    try:
        yield _Context()
    finally:
        server.set_forkserver_preload(preloaded)
        if not was_there:
            server._stop()


class _Process(ForkServerProcess):
    """A process that does not import the program that is run."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        program = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            return ForkServerProcess._Popen(process_obj)  # type: ignore[attr-defined]
        finally:
            sys.modules["__main__"] = program


class _Context(ForkServerContext):
    Process = _Process


def _start(data: DataConfig, columns: list[str], tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """Prepare a worker: it has one thread, since there are others, and it ends with the process that it works for."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    employer = multiprocessing.parent_process()
    assert employer is not None

    def leave() -> None:
        employer.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
    _encoder = Encoder.of(data, columns, tokenizer, what)


def _encode(rows: list[dict], start: int) -> Encoded:
    assert _encoder is not None
    return encode_rows(rows, start, _encoder)
