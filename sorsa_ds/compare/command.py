"""The way through a comparison: what is asked for, the runs one after the other, and the tables after each."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sorsa_ds import cli, ds_config
from sorsa_ds.compare import figure, tables
from sorsa_ds.compare.results import Result, best_rate, by_method
from sorsa_ds.compare.runner import Runner
from sorsa_ds.compare.trials import NO_REGULARIZER, RUNS, Trial, read_learning_rates, read_methods, read_seeds
from sorsa_ds.config import RunConfig
from sorsa_ds.console import bar, say
from sorsa_ds.methods.settings import check_stage

OPTIONS = {
    "methods": f"what is compared, as in sorsa,lora; {NO_REGULARIZER} is sorsa with gamma = 0",
    "output": "folder of the comparison; the same command again goes on in it",
    "seeds": "seeds of each method (default 1,2,3)",
    "learning_rates": "1e-4,3e-4 for every method, lora=1e-3 for one; of several the best on the first seed is taken",
    "num_gpus": "ranks: GPUs of this machine, or processes where it has none (default: all GPUs, or one process)",
    "config": "YAML file with settings that all runs share",
    "ds_config": "DeepSpeed JSON of all runs (default ds_configs/zero2.json)",
}
USAGE = """\
Compare SORSA with other methods: the same training for each, one after the other, in one table and one picture.

  python launch/compare.py --methods sorsa,pissa,lora,adalora,full --seeds 1,2,3 --output comparisons/first
  python launch/compare.py --config run.yaml --methods sorsa,lora --learning_rates 1e-4,3e-4,1e-3 --output DIR

Settings as for launch/train.py; what a method has no use for is left out of its runs, and told.
"""
_OWN = {"method": "--methods", "train.seed": "--seeds", "output.folder": "--output", "output.name": "--output"}


@dataclass(slots=True)
class Request:
    """What one command line asks for."""

    base: RunConfig
    ds_config: Path
    output: Path
    methods: list[str]
    seeds: list[int]
    rates: dict[str, list[float]]
    num_gpus: int | None


def parse(argv: Sequence[str]) -> Request:
    """ValueError lists everything wrong; `--help` prints and exits."""
    errors = cli.Errors()
    options, overrides = cli.split(argv, OPTIONS, errors)
    if "help" in options:
        print(cli.help_text(RunConfig, USAGE, OPTIONS))
        raise SystemExit(0)
    for option in ("methods", "output"):
        if not options.get(option):
            errors.append(f"--{option} is missing: {OPTIONS[option]}")
    errors.stop()
    file, base = None, RunConfig()
    methods, seeds, rates = [], [], {}
    ranks = options.get("num_gpus")
    with errors.noted():
        json_file = cli.find_file("--ds_config", options.get("ds_config", "ds_configs/zero2.json"), "ds_configs/*.json")
    with errors.noted():
        file = cli.find_file("--config", options["config"], "launch/recipes/*.yaml") if "config" in options else None
    with errors.noted():
        base = cli.absolute(cli.load(RunConfig, file, overrides, OPTIONS))
        _refuse_own(base)
    with errors.noted():
        methods = read_methods(options["methods"])
        rates = read_learning_rates(options.get("learning_rates", ""), methods, base.train.learning_rate)
    with errors.noted():
        seeds = read_seeds(options.get("seeds", "1,2,3"))
    if ranks is not None and not (ranks.isascii() and ranks.isdigit() and int(ranks) > 0):
        errors.append(f"--num_gpus: {ranks!r} is no integer >= 1")
    errors.stop()
    output = Path(options["output"]).expanduser().resolve()
    return Request(base, json_file, output, methods, seeds, rates, int(ranks) if ranks else None)


def _refuse_own(base: RunConfig) -> None:
    """What the comparison sets itself must not be set otherwise."""
    default = RunConfig()
    given = {
        "method": (base.method, default.method),
        "train.seed": (base.train.seed, default.train.seed),
        "output.folder": (base.output.folder, default.output.folder),
        "output.name": (base.output.name, default.output.name),
    }
    wrong = [f"{path}: {_OWN[path]} says that here" for path, (now, then) in given.items() if now != then]
    if wrong:
        raise ValueError("\n".join(wrong))


@dataclass(slots=True)
class Progress:
    """A comparison under way."""

    request: Request
    runner: Runner
    finished: list[Result] = field(default_factory=list)
    failed: dict[Trial, str] = field(default_factory=dict)

    def attempt(self, trials: list[Trial], shown) -> None:
        """Make runs; one that fails is noted, and the others go on.

        Raises:
            Preempted: a signal came.
        """
        for trial in trials:
            shown.set_postfix_str("", refresh=False)
            shown.set_description(trial.name)
            if not self.runner.is_finished(trial):
                failure = self.runner.run(trial, lambda step: shown.set_postfix_str(f"step {step}"))
                if failure is not None:
                    self.failed[trial] = failure
                    say(f"{trial.name} failed: {failure}")
            if trial not in self.failed:
                result = Result.read(trial, self.runner.folder(trial), {})
                self.finished.append(result)
                say(f"{trial.name}: {_short(result)}")
                self.write()
            shown.update()

    def rate(self, method: str) -> float | None:
        """A method's best rate so far."""
        return best_rate(self.finished, method, self.request.seeds[0])

    def write(self) -> None:
        """The tables and the picture of what is there."""
        request = self.request
        methods = by_method(self.finished, request.methods, self.rate)
        left_out = {
            method: found for method in request.methods if (found := _first(request, method).left_out(request.base))
        }
        comparison = tables.Comparison(
            request.base, [], methods, self.finished, self.failed, left_out, request.seeds[0]
        )
        tables.write(comparison, request.output)
        figure.draw(methods, request.output)


def compare(argv: Sequence[str]) -> None:
    """Everything. The rates are tried with the first seed; the other seeds run at the best one.

    Raises:
        ValueError: bad arguments, before anything runs; or at the end, naming the runs that failed.
        Preempted: a signal came; the same command goes on.
    """
    request = parse(argv)
    runner = Runner(request.base, request.ds_config, request.output, request.num_gpus)
    _check(request, runner)
    progress = Progress(request, runner)
    first, *others = request.seeds
    tried = [Trial(method, rate, first) for method in request.methods for rate in request.rates[method]]
    say(f"{len(tried)} runs with seed {first}, then {len(others) * len(request.methods)} with the other seeds: "
        f"{request.output / RUNS}")  # fmt: skip
    with bar(len(tried) + len(others) * len(request.methods), "comparing", "run") as shown:
        progress.attempt(tried, shown)
        chosen = [(method, progress.rate(method)) for method in request.methods]
        progress.attempt([Trial(m, rate, seed) for seed in others for m, rate in chosen if rate is not None], shown)
    progress.write()
    say(f"\n{(request.output / 'comparison.md').read_text(encoding='utf-8')}\n{request.output / 'comparison.md'}")
    if progress.failed:
        names = ", ".join(trial.name for trial in progress.failed)
        raise ValueError(f"{len(progress.failed)} runs failed ({names}); the same command tries them again")


def _check(request: Request, runner: Runner) -> None:
    """Stop before the first run where a later one could not be made."""
    errors = cli.Errors()
    zero = ds_config.load(request.ds_config).get("zero_optimization", {})
    for method in request.methods:
        with errors.noted():
            check_stage(method, zero.get("stage", 0))
        for rate in request.rates[method]:
            for seed in request.seeds:
                with errors.noted():
                    runner.check(Trial(method, rate, seed))
    errors.stop()


def _first(request: Request, method: str) -> Trial:
    return Trial(method, request.rates[method][0], request.seeds[0])


def _short(result: Result) -> str:
    report = result.report
    held_out = "" if report["eval_loss_end"] is None else f"held-out loss {report['eval_loss_end']:.4f}, "
    return f"{held_out}training loss {report['loss_last']:.4f}, {report['train_seconds']:.0f} s"
