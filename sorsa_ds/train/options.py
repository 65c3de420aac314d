"""The training command: its options, its usage, and what one command line asks for."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from sorsa_ds.config.command_line import (
    DEFAULT_DS_CONFIG,
    Errors,
    find_ds_config,
    find_settings_file,
    help_text,
    load_settings,
    split,
)
from sorsa_ds.config.deepspeed_json import read_ds_config
from sorsa_ds.config.renamed import name_now
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.run.paths import CONFIG, GIVEN_DS_CONFIG, named_run
from sorsa_ds.runtime.console import aside

TRAIN_OPTIONS = {
    "config": "YAML file with settings",
    "ds_config": f"DeepSpeed JSON (default {DEFAULT_DS_CONFIG}; with --resume FOLDER: the run's)",
    "resume": "go on with a run: its folder, one of its checkpoints, or `auto` (the newest unfinished one, else begin)",
    "local_rank": "added by DeepSpeed's launcher; ignored",
}
TRAIN_USAGE = """\
Fine-tune a causal language model with SORSA on DeepSpeed.

  deepspeed launch/train.py --ds_config ds_configs/zero3.json
  deepspeed --num_gpus 1 launch/train.py --ds_config ds_configs/stage0.json --config run.yaml adapter.rank=64
  deepspeed launch/train.py --resume runs/NAME

  --verbose        also print which rank decomposes how much
"""
_TRUST = "loading.trust_remote_code"


@dataclasses.dataclass(frozen=True)
class Invocation:
    """What one command line of the training command asks for.

    config: the settings. ds_config: path of the DeepSpeed JSON. resume: what --resume says; None without it.
    file: the YAML file with settings, if there is one. on_command_line: the settings that the command line itself sets.
    verbose: whether details are printed.
    """

    config: RunConfig
    ds_config: Path
    resume: str | None = None
    file: Path | None = None
    on_command_line: frozenset[str] = frozenset()
    verbose: bool = False

    @property
    def named_run(self) -> Path | None:
        """The absolute folder of the run that --resume names; None of a new run, and with `--resume auto`."""
        return named_run(self.resume)


def parse(argv: Sequence[str], tell: Callable[[str], None] = aside) -> Invocation:
    """Read the command line of the training command. `--help` prints, on one rank, and ends the process.

    Args:
        tell: called with a sentence on settings that are given under earlier names.

    Raises:
        ValueError: listing everything that is wrong with it.
    """
    errors = Errors()
    words = [word for word in argv if word != "--verbose"]
    options, overrides = split(words, TRAIN_OPTIONS, errors)
    if "help" in options:
        if options.get("local_rank", "0") == "0":
            print(help_text(RunConfig, TRAIN_USAGE, TRAIN_OPTIONS))
        raise SystemExit(0)
    ds_config = file = config = None
    resume = options.get("resume")
    run = named_run(resume)
    of_run: dict[str, str] = {}
    if run is not None:  # what the command line does not say is as the run has it
        kept = {"config": run / CONFIG, "ds_config": run / GIVEN_DS_CONFIG}
        of_run = {option: str(path) for option, path in kept.items() if path.exists() and option not in options}
        options |= of_run
    with errors.noted():
        ds_config = find_ds_config(options)
    with errors.noted():
        file = find_settings_file(options)
    with errors.noted():
        config = load_settings(RunConfig, file, overrides, TRAIN_OPTIONS, tell)
        if config.loading.trust_remote_code and "config" in of_run and _TRUST not in dict(overrides):
            raise ValueError(
                f"--resume: {file} asks to run Python code that comes with the model {config.model!r} ({_TRUST}), "
                f"which a run's folder cannot allow: if you trust that model's author, add {_TRUST}=true"
            )
    if "ds_config" in of_run:
        with errors.noted():
            _refuse_chosen_file(of_run["ds_config"])
    errors.stop()
    set_here = frozenset(name_now(path) for path, _ in overrides)
    return Invocation(config, ds_config, resume, file, set_here, verbose=len(words) < len(argv))


def _refuse_chosen_file(stored: str) -> None:
    """Stop where the DeepSpeed JSON that lies in a run's folder, which may be anybody's, names a file to write."""
    profiler = read_ds_config(Path(stored)).get("flops_profiler")
    if isinstance(profiler, dict) and profiler.get("output_file") is not None:
        raise ValueError(
            f"--resume: {stored} names a file to write (flops_profiler.output_file), which a run's folder cannot "
            f"choose: give the JSON yourself, --ds_config FILE"
        )
