"""The launcher above this process, DeepSpeed's or torchrun's: what it was told to start, and what to do at its end."""

import os
import shlex
import signal
import sys
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

from sorsa_ds.runtime.words import typed

COMMAND = "SORSA_COMMAND"
"""The environment variable in which the scripts of launch/ say how they were called, without the settings."""

SCRIPT = "SORSA_SCRIPT"
"""The environment variable in which a script of launch/ gives its process id to what it starts."""

_INNER = "deepspeed.launcher.launch"
_MODULES = (_INNER, "deepspeed.launcher.runner", "torch.distributed.run")
_PROGRAMS = ("deepspeed", "torchrun")


def command(*words: str) -> str:
    """The command that started this job, up to its script, with these words behind it; quoted for a shell."""
    return " ".join([_begin(), shlex.join(words)])


def same_command(*words: str, without: str | None = None) -> str:
    """The command that started this job, with more words behind it; quoted for a shell.

    Args:
        without: a setting that is left out.
    """
    dropped = ("--local_rank", *([f"{without}="] if without else []))  # DeepSpeed's launcher has added the first
    return command(*(word for word in sys.argv[1:] if not word.startswith(dropped)), *words)


def begin_again() -> str:
    """The command that started this job, so that it begins a run anew which has saved nothing."""
    return same_command(*([] if any(word.startswith("--resume") for word in sys.argv) else ["--resume", "auto"]))


def beside(program: str, script: str, *words: str) -> str:
    """A command whose script lies beside that of this job; quoted for a shell. Of `sorsa` where that has started it.

    Args:
        program: what starts the script.
    """
    if os.environ.get(COMMAND, "").startswith("sorsa "):
        return shlex.join(["sorsa", Path(script).stem, *words])
    return shlex.join([program, typed(Path(sys.argv[0]).with_name(script)), *words])


def watch() -> None:
    """Let this process receive SIGTERM when its launcher ends, which a signal can do without reaching the ranks.

    The launcher is also the script of launch/ where that has started this process, directly or by another launcher.

    DeepSpeed's launcher is two processes. Where the inner one is killed, the outer one, which is the command that was
    typed, would end with exit code 0, as if the ranks had finished; it is ended by SIGTERM before it can.
    """
    _begin()
    above = _launchers()
    for place, launcher in enumerate(above):
        arguments = (launcher, above[place + 1 :])
        threading.Thread(target=_await_end, args=arguments, name="launcher", daemon=True).start()
    if (script := _script()) is not None:
        threading.Thread(target=_await_end, args=(script, []), name="script", daemon=True).start()


def _script() -> psutil.Process | None:
    """The script of launch/ among the parents of this process; None where it is none of them.

    Under srun it is no parent, and on another node or in another container its number is that of another process.
    """
    number = os.environ.get(SCRIPT, "")
    with suppress(psutil.Error):
        return next((one for one in psutil.Process().parents() if str(one.pid) == number), None)
    return None


def _await_end(launcher: psutil.Process, outer: list[psutil.Process]) -> None:
    launcher.wait()
    for process in outer:
        with suppress(psutil.Error):
            process.terminate()
    os.kill(os.getpid(), signal.SIGTERM)


@cache
def _begin() -> str:
    """How the job was started, up to the script. Found once, since the launcher may end before it is asked for."""
    if told := os.environ.get(COMMAND):
        return told
    for launcher in reversed(_launchers()):
        with suppress(psutil.Error, ValueError):
            words = launcher.cmdline()[1:]
            words = words[: words.index(sys.argv[0]) + 1]
            if _INNER in words:  # started by a command on another node, which this one cannot see
                return shlex.join(["deepspeed", sys.argv[0]])
            return shlex.join(["python", *words] if words[0].startswith("-") else [Path(words[0]).name, *words[1:]])
    return shlex.join(["python", sys.argv[0]])


def _launchers() -> list[psutil.Process]:
    """The processes of the launcher among the parents of this process, the nearest first."""
    found = []
    with suppress(psutil.Error):  # a parent may belong to another user
        for process in psutil.Process().parents():
            if not is_launcher(process.cmdline()):  # a shell, which may end before its children
                break
            found.append(process)
    return found


def is_launcher(words: list[str]) -> bool:
    """Whether a command line is that of a launcher.

    It is one like `python .../bin/deepspeed ...`, `python -u -m deepspeed.launcher.launch ...`.
    """
    for place, word in enumerate(words[1:], start=1):
        if word == "-m":
            return words[place + 1 : place + 2] in ([module] for module in _MODULES)
        if not word.startswith("-"):
            return Path(word).name in _PROGRAMS
    return False
