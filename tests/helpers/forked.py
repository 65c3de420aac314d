"""The training command in ranks that are forked from the tests' process, which has imported everything already.

It takes a second or two where `projects.launch` takes ten: the start of the interpreter, the imports and DeepSpeed's
launcher are left out. A few tests in tests/launch still go the whole way.
"""

import gc
import logging
import os
import runpy
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

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
    import_once()
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as printed:
        common = (ranks, free_port(), words, environment_of(project, **environment), printed.fileno())
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
        printed.seek(0)
        text = printed.read()
    assert any(process.exitcode for process in processes) == (code != 0), text[-4000:]
    return text, time.monotonic() - began


def _command(rank: int, world: int, port: int, words: list[str], environment: dict[str, str], output: int) -> None:
    """One rank: a process that looks as if it had been started with these words."""
    for standard in (1, 2):
        os.dup2(output, standard)
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
        os._exit(left)
