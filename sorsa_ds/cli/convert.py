"""The command `convert`: another trainer's file as settings for --config.

sorsa convert axolotl.yaml                    # LLaMA-Factory's, transformers' TrainingArguments and PEFT's too
sorsa convert axolotl.yaml --output run.yaml --gpus 8
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from sorsa_ds.config.command_line import Errors, split
from sorsa_ds.runtime import exit_codes

OPTIONS = {
    "output": "file to write; without, the settings go to stdout",
    "gpus": "GPUs of the run, over all nodes: the batch of all of them is written",
    "steps": "optimizer steps of the run, where the file gives something as a number of them",
    "method": "method to train with (default: the file's, and sorsa in the place of LoRA)",
    "without": "keys to leave out, with commas, although something else is learned then",
}
USAGE = "\n".join(
    [
        "Turn a file of axolotl's, LLaMA-Factory's, transformers' TrainingArguments or PEFT's adapter_config.json into",
        "settings for --config. What is not carried over is said; what would change the training is refused.",
        "",
        "  sorsa convert FILE [--output run.yaml] [--gpus N]",
        "",
        *(f"  --{name:<8} {text}" for name, text in OPTIONS.items()),
    ]
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these words, those of the process if None, and end the process."""
    exit_codes.run(lambda: _convert(sys.argv[1:] if argv is None else argv))


def _convert(argv: Sequence[str]) -> None:
    errors = Errors()
    files = [word for place, word in enumerate(argv) if _is_file(argv, place)]
    options, settings = split([word for place, word in enumerate(argv) if not _is_file(argv, place)], OPTIONS, errors)
    if "help" in options:
        print(USAGE)
        return
    errors += [f"convert has no option {name}; there are --{', --'.join(OPTIONS)}" for name, _ in settings]
    if len(files) != 1:
        errors.append(f"one file is expected, and there are {len(files)}: sorsa convert FILE")
    errors.stop()
    from sorsa_ds.config.conversion import convert as conversion

    made = conversion.convert(
        Path(files[0]),
        gpus=_count(options, "gpus"),
        steps=_count(options, "steps"),
        method=options.get("method"),
        without=[key.strip() for key in options.get("without", "").split(",") if key.strip()],
    )
    config = conversion.settings_of(made)
    from sorsa_ds.methods.settings import ignored, listed  # imports PyTorch
    from sorsa_ds.runtime.console import aside
    from sorsa_ds.runtime.files import write_text

    if unused := ignored(config):
        keys = {made.settings[path][1] for path in unused if path in made.settings}
        raise ValueError(
            f"{made.file}: method {config.method} has no use for {listed(unused)} ({', '.join(sorted(keys))}): take "
            f"another --method, or leave it out by --without"
        )
    text = conversion.as_yaml(made, config)
    for line in conversion.told(made):
        aside(line)
    if "output" not in options:
        sys.stdout.write(text)
        return
    output = Path(options["output"])
    if output.exists():
        raise ValueError(f"--output {output}: there is such a file already")
    write_text(output, text)
    aside(f"Written to {output}: sorsa train --config {output}")


def _is_file(argv: Sequence[str], place: int) -> bool:
    """Whether a word is no option and no option's value."""
    before = argv[place - 1] if place else ""
    return not argv[place].startswith("-") and not (
        before.startswith("--") and "=" not in before and before != "--help"
    )


def _count(options: dict[str, str], name: str) -> int | None:
    """A whole number from 1 that an option has; None where it is not given.

    Raises:
        ValueError: it is no such number.
    """
    text = options.get(name)
    if text is not None and not (text.isdecimal() and 0 < int(text) < 10**9):
        raise ValueError(f"--{name} {text}: must be a whole number from 1 to 999999999")
    return None if text is None else int(text)
