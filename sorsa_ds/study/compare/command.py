"""The way of a comparison: read what is asked for, make the runs one after the other, write the tables after each."""

from dataclasses import dataclass, field, replace

from tqdm import tqdm

from sorsa_ds.config import command_line, deepspeed_json
from sorsa_ds.methods.settings import check_stage
from sorsa_ds.runtime.console import bar, say
from sorsa_ds.runtime.folder_lock import at_work_in
from sorsa_ds.study.compare import figure, tables
from sorsa_ds.study.compare.frontier import frontier_of
from sorsa_ds.study.compare.request import Request
from sorsa_ds.study.compare.results import Result, best_rate, by_method
from sorsa_ds.study.compare.runner import Runner
from sorsa_ds.study.compare.score import BASE, Evaluation
from sorsa_ds.study.compare.trials import RUNS, Trial


@dataclass(slots=True)
class Comparing:
    """A comparison that is under way.

    before: the base model's score. finished: results of the runs that are finished. failed: why the others failed.
    """

    request: Request
    runner: Runner
    before: float | None = None
    finished: list[Result] = field(default_factory=list)
    failed: dict[Trial, str] = field(default_factory=dict)

    def attempt(self, trials: list[Trial], shown: tqdm) -> None:
        """Make runs. One that fails is noted, and the others go on.

        Args:
            shown: the progress bar.

        Raises:
            Preempted: this process was told to stop.
        """
        for trial in trials:
            shown.set_postfix_str("", refresh=False)
            shown.set_description(trial.name)
            if not self.runner.is_finished(trial):
                failure = self.runner.make_run(trial, lambda step: shown.set_postfix_str(f"step {step}"))
                if failure is not None:
                    self.failed[trial] = failure
                    say(f"{trial.name} failed: {failure}")
            if self.runner.is_finished(trial):
                result = Result.read(trial, self.runner.folder(trial))
                self.finished.append(result)
                say(f"{trial.name}: {_short(result)}")
                self.write()
            shown.update()

    def measure(self, evaluation: Evaluation, shown: tqdm) -> None:
        """Measure the scores of the runs: at all learning rates, or at their methods' best ones, as the task wants.

        Args:
            shown: the progress bar.

        Raises:
            Preempted: this process was told to stop.
        """
        for i, run in enumerate(self.finished):
            if evaluation.of_every_rate or run.trial.learning_rate == self.rate(run.trial.method):
                shown.set_description(f"evaluating {run.trial.name}")
                found, failure = evaluation.measure(str(run.folder), run.trial.name, self.runner)
                if failure is None:
                    self.finished[i] = replace(run, score=found)
                    say(f"{run.trial.name}: {evaluation.score.replace('_', ', ')} {found:{evaluation.form}}")
                    self.write()
                else:
                    self.failed[run.trial] = f"it was trained, but not evaluated: {failure}"
                    say(f"{run.trial.name} failed: {self.failed[run.trial]}")
                shown.update()

    def rate(self, method: str) -> float | None:
        """The best learning rate of a method so far; None where none of its runs is finished."""
        return best_rate(self.finished, method, self.request.seeds[0])

    def write(self) -> None:
        """Write the tables and the picture of the runs that are finished."""
        request = self.request
        methods = by_method(self.finished, request.methods, self.rate)
        left_out = {method: found for method in request.methods if (found := request.left_out(method))}
        drifts = request.evaluation is not None and request.evaluation.task == "drift"
        frontier = frontier_of(self.finished, request.methods, request.seeds[0]) if drifts else None
        comparison = tables.Comparison(
            request.base, request.evaluation, self.before, methods, self.finished, self.failed, left_out,
            request.seeds[0], frontier,
        )  # fmt: skip
        tables.write_tables(comparison, request.output)
        figure.draw_comparison(methods, request.output)
        if frontier is not None:
            figure.draw_frontier(frontier, request.output)


def compare(request: Request) -> None:
    """Make a whole comparison: all learning rates with the first seed, the other seeds at the best rate or at all.

    Raises:
        ValueError: before anything runs, settings that do not go together or a folder that is in use; at the end, the
            runs that failed.
        Preempted: this process was told to stop; the same command goes on.
    """
    runner = Runner(request.base, request.ds_config, request.output, request.num_gpus)
    _check_trials(request, runner)
    with at_work_in(request.output):
        _compare(request, runner)


def _compare(request: Request, runner: Runner) -> None:
    comparing = Comparing(request, runner, _before(request, runner))
    first, *others = request.seeds
    tried = [Trial(method, rate, first) for method in request.methods for rate in request.rates[method]]
    later = len(others) * (len(tried) if request.every_seed else len(request.methods))
    say(f"{len(tried)} runs with seed {first}, then {later} with the other seeds: {request.output / RUNS}")
    with bar(len(tried) + later, "comparing", "run") as shown:
        comparing.attempt(tried, shown)
        rates = {method: [comparing.rate(method)] for method in request.methods}
        chosen = [
            (method, rate)
            for method in request.methods
            for rate in (request.rates if request.every_seed else rates)[method]
        ]
        comparing.attempt([Trial(m, rate, seed) for seed in others for m, rate in chosen if rate is not None], shown)
    if request.evaluation is not None:
        runs = (
            len(comparing.finished) if request.evaluation.of_every_rate else len(request.methods) * len(request.seeds)
        )
        with bar(runs, "evaluating", "run") as shown:
            comparing.measure(request.evaluation, shown)
    comparing.write()
    say(f"\n{(request.output / 'comparison.md').read_text(encoding='utf-8')}\n{request.output / 'comparison.md'}")
    if comparing.failed:
        names = ", ".join(trial.name for trial in comparing.failed)
        raise ValueError(f"failed: {names}; the same command tries again")


def _check_trials(request: Request, runner: Runner) -> None:
    """Stop before the first run where one of the runs could not be made."""
    errors = command_line.Errors()
    zero = deepspeed_json.read_ds_config(request.ds_config).get("zero_optimization") or {}
    for method in request.methods:
        with errors.noted():
            check_stage(method, zero.get("stage", 0))
        for rate in request.rates[method]:
            for seed in request.seeds:
                with errors.noted():
                    runner.check_unchanged(Trial(method, rate, seed))
    errors.stop()


def _before(request: Request, runner: Runner) -> float | None:
    """The base model's score, if one is asked for. It is measured before any run, so that wrong options cost no run."""
    if request.evaluation is None:
        return None
    say(f"{request.evaluation.task} before training")
    found, failure = request.evaluation.measure(request.base.model, BASE, runner)
    if failure is not None:
        raise ValueError(f"--task {request.evaluation.task}: the base model cannot be evaluated: {failure}")
    return found


def _short(result: Result) -> str:
    report = result.report
    held_out = "" if report["eval_loss_end"] is None else f"held-out loss {report['eval_loss_end']:.4f}, "
    return f"{held_out}training loss {report['loss_last']:.4f}, {report['train_seconds']:.0f} s"
