"""The way through a comparison: what is asked for, the runs one after the other, and the tables after each."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sorsa_ds.config import command_line, deepspeed_json
from sorsa_ds.methods.settings import check_stage
from sorsa_ds.runtime.console import bar, say
from sorsa_ds.runtime.folder_lock import at_work_in
from sorsa_ds.study.compare import figure, tables
from sorsa_ds.study.compare.request import Request, parse
from sorsa_ds.study.compare.results import Result, best_rate, by_method
from sorsa_ds.study.compare.runner import Runner
from sorsa_ds.study.compare.score import BASE
from sorsa_ds.study.compare.trials import RUNS, Trial


@dataclass(slots=True)
class Progress:
    """A comparison under way."""

    request: Request
    runner: Runner
    before: float | None = None
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
            if self.runner.is_finished(trial):
                result = Result.read(trial, self.runner.folder(trial))
                self.finished.append(result)
                say(f"{trial.name}: {_short(result)}")
                self.write()
            shown.update()

    def measure(self, shown) -> None:
        """Give the runs at their methods' best rates their scores.

        Raises:
            Preempted: a signal came.
        """
        for i, run in enumerate(self.finished):
            if run.trial.learning_rate == self.rate(run.trial.method):
                shown.set_description(f"evaluating {run.trial.name}")
                found, failure = self.request.evaluation.of(str(run.folder), run.trial.name, self.runner)
                if failure is None:
                    self.finished[i] = replace(run, score=found)
                    say(f"{run.trial.name}: {self.request.evaluation.score.replace('_', ', ')} {found:.2f}")
                    self.write()
                else:
                    self.failed[run.trial] = f"it was trained, but not evaluated: {failure}"
                    say(f"{run.trial.name} failed: {self.failed[run.trial]}")
                shown.update()

    def rate(self, method: str) -> float | None:
        """A method's best rate so far."""
        return best_rate(self.finished, method, self.request.seeds[0])

    def write(self) -> None:
        """The tables and the picture of what is there."""
        request = self.request
        methods = by_method(self.finished, request.methods, self.rate)
        left_out = {method: found for method in request.methods if (found := request.left_out(method))}
        comparison = tables.Comparison(
            request.base, request.evaluation, self.before, methods, self.finished, self.failed, left_out,
            request.seeds[0],
        )  # fmt: skip
        tables.write(comparison, request.output)
        figure.draw(methods, request.output)


def compare(argv: Sequence[str]) -> None:
    """Everything. The rates are tried with the first seed; the other seeds run at the best one.

    Raises:
        ValueError: bad arguments or a folder in use, before anything runs; or at the end, naming the runs that failed.
        Preempted: a signal came; the same command goes on.
    """
    request = parse(argv)
    runner = Runner(request.base, request.ds_config, request.output, request.num_gpus)
    _check(request, runner)
    with at_work_in(request.output):
        _compare(request, runner)


def _compare(request: Request, runner: Runner) -> None:
    progress = Progress(request, runner, _before(request, runner))
    first, *others = request.seeds
    tried = [Trial(method, rate, first) for method in request.methods for rate in request.rates[method]]
    say(f"{len(tried)} runs with seed {first}, then {len(others) * len(request.methods)} with the other seeds: "
        f"{request.output / RUNS}")  # fmt: skip
    with bar(len(tried) + len(others) * len(request.methods), "comparing", "run") as shown:
        progress.attempt(tried, shown)
        chosen = [(method, progress.rate(method)) for method in request.methods]
        progress.attempt([Trial(m, rate, seed) for seed in others for m, rate in chosen if rate is not None], shown)
    if request.evaluation is not None:
        with bar(len(request.methods) * len(request.seeds), "evaluating", "run") as shown:
            progress.measure(shown)
    progress.write()
    say(f"\n{(request.output / 'comparison.md').read_text(encoding='utf-8')}\n{request.output / 'comparison.md'}")
    if progress.failed:
        names = ", ".join(trial.name for trial in progress.failed)
        raise ValueError(f"failed: {names}; the same command tries again")


def _check(request: Request, runner: Runner) -> None:
    """Stop before the first run where a later one could not be made."""
    errors = command_line.Errors()
    zero = deepspeed_json.read_ds_config(request.ds_config).get("zero_optimization", {})
    for method in request.methods:
        with errors.noted():
            check_stage(method, zero.get("stage", 0))
        for rate in request.rates[method]:
            for seed in request.seeds:
                with errors.noted():
                    runner.check(Trial(method, rate, seed))
    errors.stop()


def _before(request: Request, runner: Runner) -> float | None:
    """The base model's score, if it is asked for: before any run, so that wrong options cost nothing."""
    if request.evaluation is None:
        return None
    say(f"{request.evaluation.task} before training")
    found, failure = request.evaluation.of(request.base.model, BASE, runner)
    if failure is not None:
        raise ValueError(f"--task {request.evaluation.task}: the base model cannot be evaluated: {failure}")
    return found


def _short(result: Result) -> str:
    report = result.report
    held_out = "" if report["eval_loss_end"] is None else f"held-out loss {report['eval_loss_end']:.4f}, "
    return f"{held_out}training loss {report['loss_last']:.4f}, {report['train_seconds']:.0f} s"
