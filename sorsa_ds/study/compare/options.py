"""The command line of a comparison: its options and its usage, which are told without importing PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sorsa_ds.config import command_line
from sorsa_ds.config.schema import RunConfig

if TYPE_CHECKING:
    from sorsa_ds.study.compare.request import Request

DEFAULT_DS_CONFIG = "ds_configs/zero2.json"
DEFAULT_SEEDS = "1,2,3"
OPTIONS = {
    "methods": "what is compared, as in sorsa,lora; also sorsa-no-reg: SORSA without its regulariser",
    "output": "folder of the comparison; the same command again goes on in it",
    "seeds": f"seeds of each method (default {DEFAULT_SEEDS})",
    "learning_rates": "1e-4,3e-4 for every method, lora=1e-3 for one; of several the best on the first seed is used",
    "rate_seeds": "which seeds run at all learning rates: first (default; the others run at the best one), or all",
    "num_gpus": "ranks: GPUs of this machine, or processes where it has none (default: all GPUs, or one process)",
    "task": "what to measure of every model and of the base model: accuracy in gsm8k, math, humaneval or mmlu, the "
    "perplexity of a text (loss, with --data in --task_options), or drift from the base model (at every rate, with a "
    "figure of held-out loss against drift); default: nothing",
    "task_options": 'further options of launch/evaluate.py, as in --task_options="--data DIR --limit 200"',
    "config": "YAML file with settings that all runs share",
    "ds_config": f"DeepSpeed JSON of all runs (default {DEFAULT_DS_CONFIG})",
}
USAGE = """\
Compare SORSA with other methods: the same training for each, one after the other, in one table and one picture.

  python launch/compare.py --methods sorsa,pissa,lora,adalora,full --seeds 1,2,3 --output comparisons/first
  python launch/compare.py --config run.yaml --methods sorsa,lora --learning_rates 1e-4,3e-4,1e-3 --output DIR

Settings are those of launch/train.py. A setting that a method has no use for is left out of its runs, and named; one
of the command line that none of the methods uses is refused.
"""


def parse(argv: Sequence[str]) -> Request:
    """Read the command line; `--help` prints the usage and exits.

    Raises:
        ValueError: the message lists everything that is wrong.
    """
    errors = command_line.Errors()
    options, overrides = command_line.split(argv, OPTIONS, errors)
    if "help" in options:
        print(command_line.help_text(RunConfig, USAGE, OPTIONS))
        raise SystemExit(0)
    for option in ("methods", "output"):
        if not options.get(option):
            errors.append(f"--{option} is missing: {OPTIONS[option]}")
    errors.stop()
    from sorsa_ds.study.compare.request import read

    return read(options, overrides, errors)
