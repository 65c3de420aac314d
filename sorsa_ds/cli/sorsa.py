"""The command `sorsa`: one name for all commands, which `pip install` puts on the path.

    sorsa train [--gpus N] [--hostfile FILE] [the arguments of launch/train.py]
    sorsa plan | preview | evaluate | export | runs | report | analyze | compare | convert | check | chat ...

Each is the same function as launch/*.py. `sorsa train` starts the ranks by the scripts of launch/, unless it is one of
them already: DeepSpeed's, torchrun's, or a task of srun, mpirun or mpiexec.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from sorsa_ds.runtime import exit_codes, rank_variables
from sorsa_ds.runtime.launcher import COMMAND
from sorsa_ds.runtime.shipped import SHIPPED
from sorsa_ds.runtime.versions import VERSION

COMMANDS = {
    "train": "fine-tune a model",
    "plan": "how much memory and time a job will take, before it is started",
    "preview": "what a run will learn from: which tokens, of which rows",
    "evaluate": "measure a model, a run or an adapter on a task",
    "chat": "ask a model, a run or an adapter",
    "export": "write a finished run as a model or an adapter",
    "runs": "what runs there are, side by side",
    "report": "a run as a page of HTML, also while it trains",
    "analyze": "measure the weights of finished runs",
    "compare": "train several methods alike, and compare them",
    "calibrate": "find the inputs that a base model uses least, for sorsa.triplets=null_space",
    "convert": "settings from a file of axolotl's, LLaMA-Factory's, transformers' or PEFT's",
    "check": "look for mistakes in a command without starting it",
    "completion": "print a script by which a shell completes these words",
}

USAGE = "\n".join(
    [
        f"sorsa {VERSION}: sorsa COMMAND [arguments]; `sorsa COMMAND --help` explains the command.",
        "",
        *(f"  {name:<10} {what}" for name, what in COMMANDS.items()),
        "",
        "`sorsa train` starts a rank on each GPU of this machine, or two on its CPUs.",
        "  --gpus N          so many",
        "  --hostfile FILE   on several nodes, with the options of launch/multi_node.sh; or --nodes N --node_rank K",
        "                    --master_addr A without such a file",
        "On clusters DeepSpeed's launcher does the same: deepspeed launch/train.py --ds_config ds_configs/zero3.json",
    ]
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these words, those of the process if None, and end the process."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "--version"):
        print(VERSION if name == "--version" else USAGE)
        return
    if name not in COMMANDS:
        exit_codes.run(lambda: _refuse(name))
    if name == "train" and not rank_variables.is_rank() and not {"-h", "--help"} & set(words):
        exit_codes.run(lambda: _launch(words[1:]))
    os.environ.setdefault(COMMAND, f"sorsa {name}")  # what messages repeat
    sys.argv = [f"sorsa {name}", *words[1:]]
    importlib.import_module(f"sorsa_ds.cli.{name}").main(words[1:])


def _refuse(name: str) -> None:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean sorsa {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
    raise ValueError(f"sorsa has no command {name}: {hint}")


def _launch(words: list[str]) -> None:
    """Become the script of launch/ that starts the ranks."""
    gpus, words = gpus_taken(words)
    own: list[str] = []
    given = {word.partition("=")[0] for word in words}
    if gpus is None and not given & {"--hostfile", "--nodes"}:
        rank_variables.check_tasks("it would train on this machine alone", "--gpus N says that this is meant")
    if given & {"--hostfile", "--nodes"}:
        if gpus is not None and "--hostfile" in given:
            raise ValueError("--gpus does not go with --hostfile, whose lines say how many GPUs each node has")
        script, own = "multi_node.sh", [] if gpus is None else ["--ranks", str(gpus)]
    elif gpus == 1:
        script = "single_gpu.sh"
    else:
        script, own = "multi_gpu.sh", [] if gpus is None else ["--ranks", str(gpus)]
    begin = "sorsa train" if gpus is None else f"sorsa train --gpus {gpus}"
    environment = {**os.environ, COMMAND: begin}
    # The environment that this command is installed in comes first, whether it is activated or not.
    environment["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    os.execvpe("bash", ["bash", str(SHIPPED / "launch" / script), *own, *words], environment)


def gpus_taken(words: list[str]) -> tuple[int | None, list[str]]:
    """How many GPUs `--gpus` among words asks for, None where it is not there, and the other words.

    Raises:
        ValueError: the value of `--gpus` is no whole number from 1.
    """
    gpus, others = _taken("--gpus", words)
    if gpus is not None and not (gpus.isdecimal() and int(gpus) > 0):
        raise ValueError(f"--gpus is {gpus!r}: a whole number from 1 is needed")
    return None if gpus is None else int(gpus), others


def _taken(option: str, words: list[str]) -> tuple[str | None, list[str]]:
    """The value of an option among words, None where it is not there, and the other words.

    Raises:
        ValueError: the option has no value.
    """
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name != option:
            continue
        if equals:
            return value, words[:place] + words[place + 1 :]
        if place + 1 == len(words):
            raise ValueError(f"{option} needs a value")
        return words[place + 1], words[:place] + words[place + 2 :]
    return None, words
