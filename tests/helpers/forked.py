"""The training command in ranks that are forked from the tests' process, which has imported everything already.

It takes a second or two where `projects.launch` takes ten: the start of the interpreter, the imports and DeepSpeed's
launcher are left out. A few tests in tests/launch still go the whole way.
"""

import functools
import gc
import logging
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import IO

import torch
from tqdm import tqdm

from sorsa_ds.runtime import launcher
from sorsa_ds.runtime.ports import free_port
from tests.helpers.projects import ROOT, environment_of, settings, words_of
from tests.helpers.worlds import FORK, import_once, told_by_launcher


def launch_forked(project: Path, name: str, *arguments: str, code=0, ranks=2, ds="zero3", job=settings, **environment):
    """Run launch/train.py to its end; returns (everything printed, run folder, seconds)."""
    words = words_of(project, name, *arguments, ds=ds, job=job)
    text, seconds = run_forked(project, words, code=code, ranks=ranks, **environment)
    return text, project / name, seconds


def run_forked(project: Path, words: list[str], code=0, ranks=1, **environment: str) -> tuple[str, float]:
    """Run a script of launch/ with its arguments to its end; returns (everything printed, seconds).

    The first rank that fails ends the others, as DeepSpeed's launcher does it.
    """
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as printed:
        codes = _run_to_the_end(words, ranks, environment_of(project, **environment), (printed, printed))
        text = _read(printed)
    assert any(codes) == (code != 0), text[-4000:]
    return text, time.monotonic() - began


def outcome_forked(project: Path, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script of launch/ in one process; returns its exit code and its two streams apart, as subprocess.run.

    The process may not start worker processes of its own, as analyze.py does.
    """
    asked = [str(word) for word in words]
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as said:
        [code] = _run_to_the_end(asked, 1, environment_of(project, **environment), (printed, said))
        return subprocess.CompletedProcess(asked, code, _read(printed), _read(said))


def _run_to_the_end(words: list[str], ranks: int, environment: dict[str, str], streams: tuple[IO, IO]) -> list[int]:
    """Run the ranks of a command; returns their exit codes. streams: where their output and their errors go."""
    import_once()
    _prepare_once()
    began = time.monotonic()
    common = (ranks, free_port(), words, environment, [stream.fileno() for stream in streams])
    processes = [FORK.Process(target=_command, args=(rank, *common), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes) and time.monotonic() - began < 300:
        if any(process.exitcode for process in processes):
            for process in processes:
                process.terminate()
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _read(stream: IO) -> str:
    stream.seek(0)
    return stream.read()


@functools.cache
def _prepare_once() -> None:
    """Import what commands load only when they need it, and draw a picture: its fonts are found and measured then."""
    if not torch.cuda.is_available():
        import sorsa_ds.evaluate.command
        import sorsa_ds.export.command
        import sorsa_ds.study.analysis.command  # noqa: F401
        from sorsa_ds.run.curves import draw_curves

        draw_curves([{"step": step, "loss": 1.0, "eval_loss": 1.0, "reg_loss": 1e-3 * step} for step in range(3)])
        gc.freeze()


def _command(rank: int, world: int, port: int, words: list[str], environment: dict, streams: list[int]) -> None:
    """One rank: a process that looks as if it had been started with these words.

    Args:
        streams: the files that its output and its errors go to.
    """
    for standard, stream in zip((1, 2), streams, strict=True):
        os.dup2(stream, standard)
    sys.stdout, sys.stderr = (os.fdopen(standard, "w", buffering=1, closefd=False) for standard in (1, 2))
    for logger in (logging.getLogger(), logging.getLogger("DeepSpeed")):
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setStream(sys.stderr)
    sys.settrace(None)  # a rank ends without saying which lines it ran: measuring them would only take time
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    gc.freeze()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment | told_by_launcher(rank, world, port))
    sys.argv = words
    launcher._begin.cache_clear()
    left = 1
    try:
        runpy.run_path(words[0], run_name="__main__")
        left = 0
    except SystemExit as leaving:
        left = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(left)
