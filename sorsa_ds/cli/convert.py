"""The command `convert`: settings from another trainer's file. Options: `sorsa_ds.config.conversion.options`."""

import sys
from collections.abc import Sequence

from sorsa_ds.runtime import exit_codes


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these words, those of the process if None, and end the process."""
    exit_codes.run(lambda: _convert(sys.argv[1:] if argv is None else argv))


def _convert(argv: Sequence[str]) -> None:
    from sorsa_ds.config.conversion import convert as conversion
    from sorsa_ds.config.conversion.options import parse

    asked = parse(argv)
    if asked.output is not None and asked.output.exists():  # before any note, which would bury it
        raise ValueError(f"--output {asked.output}: there is such a file already; name another one, or remove it first")
    made = conversion.convert(
        asked.file, gpus=asked.gpus, steps=asked.steps, method=asked.method, without=asked.without
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
    if asked.output is None:
        sys.stdout.write(text)
        return
    write_text(asked.output, text)
    aside(f"Written to {asked.output}: sorsa train --config {asked.output}")
