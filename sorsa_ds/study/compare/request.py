"""What one command line of a comparison asks for."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sorsa_ds.config import command_line
from sorsa_ds.config.batch_size import AUTO
from sorsa_ds.config.renamed import name_now
from sorsa_ds.config.schema import RunConfig
from sorsa_ds.methods.settings import listed
from sorsa_ds.study.compare.options import DEFAULT_DS_CONFIG, DEFAULT_SEEDS, OPTIONS
from sorsa_ds.study.compare.score import Evaluation
from sorsa_ds.study.compare.trials import Trial, read_learning_rates, read_methods, read_seeds

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


def read(options: Mapping[str, str], overrides: Sequence[tuple[str, str]], errors: command_line.Errors) -> Request:
    """What the words of a command line ask for.

    Args:
        options: the comparison's own options, name -> text.
        overrides: (path of a setting, text) in order.
        errors: takes up what is wrong.

    Raises:
        ValueError: the message lists everything that is wrong.
    """
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
