"""The command line of launch/convert.py: its options, its usage, and what one command line asks for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sorsa_ds.config.command_line import Errors, split

OPTIONS = {
    "output": "file to write; without, the settings go to stdout",
    "gpus": "GPUs of the run, over all nodes: the batch of all of them is written",
    "steps": "optimizer steps of the run, where the file gives something as a number of them",
    "method": "method to train with (default: the file's, and sorsa in the place of LoRA)",
    "without": "keys to leave out, with commas, although something else is learned then",
}
USAGE = "\n".join(
    [
        "Turn a file of axolotl's, LLaMA-Factory's or TRL's, transformers' TrainingArguments or PEFT's",
        "adapter_config.json into settings for --config. What is not carried over is said; what would change the",
        "training is refused.",
        "",
        "  sorsa convert FILE [--output run.yaml] [--gpus N]",
        "",
        *(f"  --{name:<8} {text}" for name, text in OPTIONS.items()),
    ]
)


@dataclass(frozen=True, slots=True)
class Request:
    """What one command line asks for. See `convert.convert`.

    output: the file to write; None: the settings are printed.
    """

    file: Path
    output: Path | None
    gpus: int | None
    steps: int | None
    method: str | None
    without: tuple[str, ...]


def parse(argv: Sequence[str]) -> Request:
    """Read the command line; `--help` prints the usage and ends the process.

    Raises:
        ValueError: listing everything that is wrong with it.
    """
    errors = Errors()
    files = [word for place, word in enumerate(argv) if _is_file(argv, place)]
    options, settings = split([word for place, word in enumerate(argv) if not _is_file(argv, place)], OPTIONS, errors)
    if "help" in options:
        print(USAGE)
        raise SystemExit(0)
    errors += [f"convert has no option {name}; there are --{', --'.join(OPTIONS)}" for name, _ in settings]
    if len(files) != 1:
        errors.append(f"one file is expected, and there are {len(files)}: sorsa convert FILE")
    counts: dict[str, int | None] = {}
    for name in ("gpus", "steps"):
        with errors.noted():
            counts[name] = _count(options, name)
    errors.stop()
    return Request(
        file=Path(files[0]),
        output=Path(options["output"]) if "output" in options else None,
        method=options.get("method"),
        without=tuple(key.strip() for key in options.get("without", "").split(",") if key.strip()),
        **counts,
    )


def _is_file(argv: Sequence[str], place: int) -> bool:
    """Whether a word is no option and no option's value."""
    before = argv[place - 1] if place else ""
    return not argv[place].startswith("-") and not (
        before.startswith("--") and "=" not in before and before != "--help"
    )


def _count(options: dict[str, str], name: str) -> int | None:
    """A whole number from 1 that an option has; None where it is not given.

    Raises:
        ValueError: the option's value is no whole number from 1 to 999999999.
    """
    text = options.get(name)
    if text is not None and not (text.isdecimal() and 0 < int(text) < 10**9):
        raise ValueError(f"--{name} {text}: must be a whole number from 1 to 999999999")
    return None if text is None else int(text)
