"""What a run does with its held-out data: the loss, answers, the best checkpoint, and the end of a run that is done."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.run.best import BestSoFar
from sorsa_ds.run.checkpoint.keeper import CheckpointKeeper
from sorsa_ds.run.checkpoint.manifest import RunProgress
from sorsa_ds.run.log import RunLog
from sorsa_ds.run.samples import shown
from sorsa_ds.runtime.console import note, say
from sorsa_ds.runtime.leave import leaving_after
from sorsa_ds.train.finite import StopUnlessFinite
from sorsa_ds.train.sampler import Sampler

_OF_TIMEOUT = 0.8
"""The part of `train.timeout_minutes` that the last answer may take where the ranks wait for one another."""


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """The loss on held-out data after some steps, nats per learned token.

    loss: the loss over all held-out data.
    by_source: the loss of each source, by its name, where there are several.
    """

    step: int
    loss: float
    by_source: dict[str, float]


@dataclass(slots=True, kw_only=True)
class Watch:
    """Makes the evaluations of a run. All methods are collective calls.

    measure: gives the losses, over all held-out data and by source; None where there is none.
    sampler: asks the model; None where it cannot be asked, and `unasked` says why.
    before_saving: sees to it that the run's folder can take a checkpoint; raises where it cannot.
    check: raises where the run is to stop for a signal.
    last: the newest evaluation.
    """

    config: RunConfig
    measure: Callable[[], tuple[float, dict[str, float]]] | None
    sampler: Sampler | None
    unasked: str
    log: RunLog
    keeper: CheckpointKeeper
    before_saving: Callable[[], None]
    check: Callable[[], None]
    stop_unless_finite: StopUnlessFinite
    last: HeldOutLoss | None = field(default=None, init=False)

    def at_start(self) -> HeldOutLoss | None:
        """Evaluate before the first step; None without held-out data. Nothing is kept of it.

        Raises:
            ValueError: the loss is no number.
            StopRequest: a signal came.
        """
        measured = self._measured(0)
        self._ask(0)
        return measured

    def on_the_way(self) -> None:
        """Evaluate after the last step, keep its checkpoint where it is the best one, and ask where that is due.

        Raises:
            ValueError: the loss is no number, or the run's folder was taken away.
            StopRequest: a signal came.
        """
        step = self.progress.step
        self._count(self._measured(step))
        if step // self.config.train.eval_every % self.config.evaluation.samples_every == 0:
            self._ask(step)

    def at_end(self) -> HeldOutLoss | None:
        """Evaluate after the run's last step, unless that is done already; None without held-out data.

        Raises:
            ValueError: the loss is no number, or the run's folder was taken away.
            StopRequest: a signal came.
        """
        step = self.progress.step
        if self.last is None or self.last.step != step:
            self._count(self._measured(step))
            self._ask(step)
        elif step // self.config.train.eval_every % self.config.evaluation.samples_every:
            self._ask(step)
        return self.last

    @property
    def stops(self) -> bool:
        """Whether the run has waited in vain as long as `evaluation.patience` says."""
        return self.best.has_waited(self.config.evaluation.patience)

    @property
    def told_stop(self) -> str:
        """Why the run stops early, in a sentence."""
        watched, best = self.config.evaluation, self.best
        least = f" by more than {watched.min_delta}" if watched.min_delta else ""
        return (
            f"Stopped early after step {self.progress.step}: the held-out loss has not fallen{least} in "
            f"{best.waited} evaluations (evaluation.patience={watched.patience}); the lowest, {best.loss:.4f}, was "
            f"that after step {best.step}."
        )

    def show_last_answer(self) -> None:
        """Show what the trained model answers to the first held-out prompt, where nothing was asked at the end.

        Whatever goes wrong is told, and changes nothing of the run, which is finished and has closed its log. Where
        the ranks gather the model for each token and one of them fails alone, the others would wait for it until their
        exchange is broken off as a failure; each rank leaves before that, as one of a finished run.
        """
        if self.config.evaluation.samples or not self.config.evaluation.last_answer:
            return
        if self.sampler is None:
            say(f"No answer of the model is shown: {self.unasked}.")
            return
        seconds = _OF_TIMEOUT * 60 * self.config.train.timeout_minutes
        told = f"the run is finished; its model has not answered within {seconds:.0f} s, so that no answer is shown"
        try:
            with leaving_after(seconds, told) if self.sampler.gathers else nullcontext():
                self._say_answers(self.progress.step, 1, lambda: None)
        except Exception as error:  # the model's own code generates
            note(f"no answer of the model is shown: {type(error).__name__}: {error}")

    @property
    def progress(self) -> RunProgress:
        """How far the run is."""
        return self.keeper.progress

    @property
    def best(self) -> BestSoFar:
        """The account of the run's evaluations."""
        return self.progress.best

    def _measured(self, step: int) -> HeldOutLoss | None:
        if self.measure is None:
            return None
        loss, by_source = self.measure()
        self.stop_unless_finite(loss, "held-out loss", step)
        told = "".join(f"; {name}: {one:.4f}" for name, one in by_source.items())
        say(f"Step {step}: held-out loss {loss:.4f} nats per token{told}.")
        self.log.write(step, eval_loss=loss, **{f"eval_loss/{name}": one for name, one in by_source.items()})
        self.last = HeldOutLoss(step, loss, by_source)
        return self.last

    def _count(self, measured: HeldOutLoss | None) -> None:
        """Take an evaluation into account; its checkpoint is kept where it is the best one."""
        if measured is None:
            return
        watched = self.config.evaluation
        self.progress.best = self.best.after(measured.step, measured.loss, watched.min_delta)
        if watched.keep_best and self.best.step == measured.step:
            self.before_saving()
            self.keeper.keep_best()

    def _ask(self, step: int) -> None:
        if self.sampler is not None and self.config.evaluation.samples:
            self._say_answers(step, self.config.evaluation.samples, self.check)

    def _say_answers(self, step: int, count: int, check: Callable[[], None]) -> None:
        assert self.sampler is not None
        samples = self.sampler.answers(count, check)
        for sample in samples:
            say(f"Step {step}, answer to held-out prompt {sample.number + 1} of {sample.source}:\n{shown(sample)}")
        self.log.write_samples(step, samples)
