"""The command line of a comparison: its options, its usage, and what one command line asks for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sorsa_ds.config import command_line
from sorsa_ds.config.batch_size import AUTO
from sorsa_ds.config.renamed import name_now
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.methods.registry import VARIANTS
from sorsa_ds.methods.settings import listed
from sorsa_ds.study.compare.score import Evaluation
from sorsa_ds.study.compare.trials import Trial, read_learning_rates, read_methods, read_seeds

DEFAULT_DS_CONFIG = "ds_configs/zero2.json"
DEFAULT_SEEDS = "1,2,3"
OPTIONS = {
    "methods": f"what is compared, as in sorsa,lora; also {', '.join(VARIANTS)}: SORSA without its regulariser",
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
_OWN = {"method": "--methods", "train.seed": "--seeds", "output.folder": "--output", "output.name": "--output"}


@dataclass(slots=True)
class Request:
    """What one command line asks for. every_seed: all seeds run at all learning rates, and not the first alone."""

    base: RunConfig
    ds_config: Path
    output: Path
    methods: list[str]
    seeds: list[int]
    rates: dict[str, list[float]]
    num_gpus: int | None
    evaluation: Evaluation | None
    every_seed: bool = False

    def left_out(self, method: str) -> dict[str, object]:
        """The settings that a method has no use for, path -> value."""
        return Trial(method, self.rates[method][0], self.seeds[0]).left_out(self.base)


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
    file, base = None, RunConfig()
    methods, seeds, rates, evaluation = [], [], {}, None
    ranks = options.get("num_gpus")
    with errors.noted():
        json_file = command_line.find_ds_config(options, DEFAULT_DS_CONFIG)
    with errors.noted():
        file = command_line.find_settings_file(options)
    with errors.noted():
        base = command_line.with_absolute_paths(command_line.load_settings(RunConfig, file, overrides, OPTIONS))
        _refuse_own(base)
    with errors.noted():
        methods = read_methods(options["methods"])
        if base.train.learning_rate == AUTO:
            raise ValueError("train.learning_rate=auto is of one run; a comparison tries numbers: --learning_rates")
        rates = read_learning_rates(options.get("learning_rates", ""), methods, base.train.learning_rate)
    with errors.noted():
        seeds = read_seeds(options.get("seeds", DEFAULT_SEEDS))
    if ranks is not None and not re.fullmatch("[1-9][0-9]{0,5}", ranks):
        errors.append(f"--num_gpus: {ranks!r} is no integer from 1 to 999,999")
    with errors.noted():
        if "task" in options:
            evaluation = Evaluation(options["task"], options.get("task_options", ""))
        elif "task_options" in options:
            raise ValueError("--task_options: there is no --task")
    if (rate_seeds := options.get("rate_seeds", "first")) not in ("first", "all"):
        errors.append(f"--rate_seeds: {rate_seeds!r} is neither first nor all")
    errors.stop()
    output = Path(options["output"]).expanduser().resolve()
    request = Request(
        base, json_file, output, methods, seeds, rates, int(ranks) if ranks else None, evaluation, rate_seeds == "all"
    )
    _refuse_unused(request, [name_now(path) for path, _ in overrides])
    return request


def _refuse_unused(request: Request, on_command_line: Sequence[str]) -> None:
    """Stop where the command line sets what none of the methods uses. One that some of them use is left out of others.

    Raises:
        ValueError: the message names these settings.
    """
    left_out = [request.left_out(method) for method in request.methods]
    unused = {path: left_out[0][path] for path in on_command_line if all(path in found for found in left_out)}
    if unused:
        methods = ", ".join(request.methods)
        raise ValueError(f"none of the methods {methods} has a use for {listed(unused)}; leave it out")


def _refuse_own(base: RunConfig) -> None:
    """Stop where a setting is given that the comparison sets itself.

    Raises:
        ValueError: the message names these settings.
    """
    default = RunConfig()
    given = {
        "method": (base.method, default.method),
        "train.seed": (base.train.seed, default.train.seed),
        "output.folder": (base.output.folder, default.output.folder),
        "output.name": (base.output.name, default.output.name),
    }
    wrong = [f"{path}: a comparison sets it by {_OWN[path]}" for path, (now, then) in given.items() if now != then]
    if wrong:
        raise ValueError("\n".join(wrong))
