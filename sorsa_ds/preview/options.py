"""The command line of launch/preview.py: its options, its usage, and what one command line asks for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sorsa_ds.config import command_line
from sorsa_ds.config.schema import RunConfig

OPTIONS = {
    "config": "YAML file with settings",
    "examples": "how many of the first examples are shown (default 3)",
    "gpus": "GPUs of the run, over all nodes, for the share of padding (default 1)",
    "plot": "picture of how long examples are: FILE.png and FILE.svg",
}
USAGE = """\
What a run will learn from: its rows read, rendered and tokenised as training does it, without loading any weight. The
tokens are kept, so that training on this machine starts with them at once.

  python launch/preview.py data.path=my.jsonl model=Qwen/Qwen3-8B
  python launch/preview.py --config run.yaml --examples 10 --plot lengths

  --json           print one JSON object as the last line, and nothing else to stdout
"""


@dataclass(frozen=True, slots=True)
class Request:
    """What one command line asks for.

    examples: how many examples are shown.
    gpus: the number of the run's GPUs.
    plot: where the picture goes; None: no picture is asked for.
    as_json: whether one JSON object is printed.
    """

    config: RunConfig
    examples: int = 3
    gpus: int = 1
    plot: Path | None = None
    as_json: bool = False


def parse(argv: Sequence[str]) -> Request:
    """Read the command line; `--help` prints the usage and exits.

    Raises:
        ValueError: the message lists everything that is wrong.
    """
    words = [word for word in argv if word != "--json"]
    errors = command_line.Errors()
    options, overrides = command_line.split(words, OPTIONS, errors)
    if "help" in options:
        print(command_line.help_text(RunConfig, USAGE, OPTIONS))
        raise SystemExit(0)
    file, config, counts = None, RunConfig(), {}
    for name, least in (("examples", 0), ("gpus", 1)):
        with errors.noted():
            if name in options:
                counts[name] = _count(options[name], f"--{name}", least)
    with errors.noted():
        file = command_line.find_settings_file(options)
    with errors.noted():
        config = command_line.with_absolute_paths(command_line.load_settings(RunConfig, file, overrides, OPTIONS))
    errors.stop()
    plot = Path(options["plot"]).expanduser() if "plot" in options else None
    return Request(config, plot=plot, as_json=len(words) < len(argv), **counts)


def _count(text: str, option: str, least: int) -> int:
    if not re.fullmatch("[0-9]{1,6}", text) or int(text) < least:
        raise ValueError(f"{option} {text}: must be a whole number from {least} to 999999")
    return int(text)
