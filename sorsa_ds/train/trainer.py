"""The training loop: a global batch, a step of the engine, a line in the log; from the first step to the report."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.data.batches import BatchPlan
from sorsa_ds.data.counts import Taken
from sorsa_ds.data.stream_batches import StreamBatches
from sorsa_ds.data.token_store import Examples
from sorsa_ds.engine.engine import SorsaEngine, StepReport
from sorsa_ds.model.sequence_parallel import SequenceParallel
from sorsa_ds.run.checkpoint.keeper import CheckpointKeeper
from sorsa_ds.run.checkpoint.manifest import RunProgress
from sorsa_ds.run.folder import check_still_held
from sorsa_ds.run.log import RunLog
from sorsa_ds.run.peft_files.beside import add_peft_files
from sorsa_ds.run.recorder import SnapshotRecorder
from sorsa_ds.run.ways_on import going_on
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.background import patiently
from sorsa_ds.runtime.console import bar, say
from sorsa_ds.runtime.errors import Preempted
from sorsa_ds.runtime.folder_lock import FolderLostError, RunLock
from sorsa_ds.runtime.launcher import begin_again
from sorsa_ds.runtime.stop_signals import StopRequest, StopSignals
from sorsa_ds.train.adapter import finish_adapter
from sorsa_ds.train.beginning import Beginning
from sorsa_ds.train.compiled_blocks import compile_blocks
from sorsa_ds.train.finite import StopUnlessFinite
from sorsa_ds.train.held_out import held_out_losses
from sorsa_ds.train.loss import LossOptions, training_losses
from sorsa_ds.train.loss_options import choose_options
from sorsa_ds.train.ready_step import ReadyStep, ReadySteps
from sorsa_ds.train.report import build_report
from sorsa_ds.train.sampler import Sampler
from sorsa_ds.train.start_check import check_packed
from sorsa_ds.train.step_meter import StepMeter
from sorsa_ds.train.watch import Watch


@dataclass(slots=True, kw_only=True)
class Trainer:
    """One run, assembled by `sorsa_ds.train.setup`.

    batches: the micro-batches of every step, for this rank.
    held_out: held-out examples of each source of the data that has any.
    sources: tells for each source what became of its rows, and how many of its examples so many steps take.
    sampler: asks the model held-out prompts; None where it cannot be asked, and `unasked` says why.
    folder: the run's. lock: held on it, to be released at the end. sequence: the ranks that share a micro-batch.
    keeper: makes the checkpoints; its `progress` is the run's account of how far it is.
    recorder: takes the snapshots for an analysis. meter: measures each step.
    signals: asked before each micro-step whether to stop. ready: makes the next step's micro-batches. loss_options: how
    losses are computed. watch: makes the evaluations. These and `stop_unless_finite` are made when training begins.
    """

    config: RunConfig
    engine: SorsaEngine
    beginning: Beginning
    batches: BatchPlan | StreamBatches
    held_out: dict[str, Examples]
    sources: Callable[[int], dict[str, Taken]]
    sampler: Sampler | None
    unasked: str
    folder: Path
    log: RunLog
    keeper: CheckpointKeeper
    recorder: SnapshotRecorder
    meter: StepMeter
    lock: RunLock
    sequence: SequenceParallel
    signals: StopSignals = field(init=False)
    loss_options: LossOptions = field(init=False)
    ready: ReadySteps = field(init=False)
    watch: Watch = field(init=False)
    stop_unless_finite: StopUnlessFinite = field(init=False)

    def train(self) -> dict:
        """Train to the last step and return the report; where a signal comes, save first. A collective call.

        Raises:
            ValueError: the loss is no number, or the model at step 0 is not the pre-trained one; on every rank.
            Preempted: SIGTERM, SIGUSR1 or SIGINT came; the state is saved.
        """
        try:
            self.prepare()
            return self.run()
        except StopRequest as request:
            raise self.stopped(request) from None
        except Exception as error:
            self.failed(error)
            raise
        finally:
            self.sequence.detach()
            self.recorder.finish()

    def prepare(self) -> None:
        """Listen for signals, and find out how losses are computed, before the first step. A collective call.

        Raises:
            ValueError: this model does not go with `train.loss_chunk` or `train.sequence_parallel`; on every rank.
        """
        group = collectives.cpu_group(timedelta(minutes=self.config.train.timeout_minutes))
        self.signals = StopSignals(group)
        engine, config, step = self.engine, self.config, self.progress.step
        self.loss_options = choose_options(engine, config, self.batches, step, self.device, self.sequence)
        longest = compile_blocks(engine, config, self.batches, step, self.loss_options)
        self.ready = ReadySteps(self.batches, group, self.device, self.sequence, longest)
        self.stop_unless_finite = StopUnlessFinite(self.keeper, self.folder, config.train.peak_rate)
        size, pad = self.batches.micro_batch_size, self.batches.pad_token_id
        rest = (self.device, self.signals.checked, self.loss_options, self.sequence)
        measure = partial(held_out_losses, engine, self.held_out, size, pad, *rest)
        self.watch = Watch(
            config=config,
            measure=measure if self.held_out else None,
            sampler=self.sampler,
            unasked=self.unasked,
            log=self.log,
            keeper=self.keeper,
            before_saving=self.before_saving,
            check=self.signals.check,
            stop_unless_finite=self.stop_unless_finite,
        )

    def run(self) -> dict:
        """Train from the first step, or the one after the checkpoint, to the report. A collective call.

        Raises:
            StopRequest: a signal came; nothing is saved for it yet.
        """
        progress = self.progress
        if isinstance(self.batches, BatchPlan):  # a stream is not packed
            check_packed(self.engine, self.batches, self.device, self.config.train.precision, self.loss_options)
        if progress.started:
            self.measure_on_the_way()
        else:
            self.start()
        losses = collectives.gather_lists(self.log.losses())
        with bar(self.batches.steps, "training", "step", progress.step) as shown:
            while progress.step < self.batches.steps and not self.watch.stops:
                with progress.timed():
                    losses.append(self.logged_step(shown))
                with progress.timed():
                    self.see_to_checkpoints()
                    self.measure_on_the_way()
        return self.finish(losses)

    def logged_step(self, shown: tqdm) -> float:
        """Make, count and log the next optimizer step; returns its loss, nats per learned token. A collective call.

        Args:
            shown: the progress bar.

        Raises:
            ValueError: something that was measured is NaN or infinite; on every rank, and before it is saved.
        """
        progress, rate = self.progress, self.engine.get_lr()[0]
        with self.meter.step(progress.step):
            self.keeper.step_begins()
            loss, ready, done = self.step(progress.step)
        self.stop_unless_finite(loss, "loss", progress.step + 1)
        self.stop_unless_finite(done.grad_norm, "norm of the loss's gradient", progress.step + 1)
        self.stop_unless_finite(done.reg_loss, "regulariser's value L_reg", progress.step + 1)
        self.stop_unless_finite(done.reg_grad_norm, "norm of the regulariser's gradient", progress.step + 1)
        progress.step, progress.tokens = progress.step + 1, progress.tokens + ready.tokens
        progress.reg_loss, progress.stream = done.reg_loss, self.batches.state
        self.log.write(
            progress.step,
            loss=loss,
            learning_rate=rate,
            grad_norm=done.grad_norm,
            reg_loss=done.reg_loss,
            reg_grad_norm=done.reg_grad_norm,
            **self.meter.figures(ready),
        )
        reg = "" if done.reg_loss is None else f", reg={done.reg_loss:.3g}"
        shown.set_postfix_str(f"loss={loss:.3f}{reg}", refresh=False)
        shown.update()
        return loss

    def finish(self, losses: list[float]) -> dict:
        """After the last step: measure and save the model, and write the report. A collective call.

        Args:
            losses: the training loss of every step of the run.

        Raises:
            ValueError: the run's folder was taken away, or it cannot be written.
        """
        if self.watch.stops:
            say(self.watch.told_stop)
        evaluated = self.watch.at_end()
        self.before_saving()
        self.keeper.save()
        finish_adapter(self.folder, self.engine)
        report = build_report(
            config=self.config,
            engine=self.engine,
            progress=self.progress,
            planned=self.batches.steps,
            losses=losses,
            eval_loss=None if evaluated is None else evaluated.loss,
            eval_losses={} if evaluated is None else evaluated.by_source,
            sources=self.sources(self.progress.step),
            held_out={name: one.counts for name, one in self.held_out.items()},
            folder=self.folder,
        )
        collectives.together(lambda: self.log.write_report(report), self.device, on=0)
        # The run is finished now. What follows may take long or fail, and changes nothing of that.
        patiently(lambda: add_peft_files(self.folder, self.config, self.device), self.device)
        patiently(lambda: self.log.close(report), self.device)
        self.watch.show_last_answer()
        self.lock.release()
        return report

    def failed(self, error: Exception) -> None:
        """Write down why the run ends, unless its folder was taken away: another run may have that place by now."""
        if collectives.rank() == 0:
            with suppress(FolderLostError):
                self.lock.check()
                self.log.write_end("failed", self.progress.step, str(error))
            self.log.close(None)

    def stopped(self, request: StopRequest) -> Preempted:
        """Save what there is after a signal; returns the message that ends the run. A collective call.

        Raises:
            ValueError: the run's folder was taken away, or it cannot be written.
        """
        self.before_saving()
        if self.progress.started:
            what = f"all of it is in {self.keeper.save()}; to go on: {going_on(self.folder)}"
        else:
            what = f"there was nothing to save yet; to begin anew: {begin_again()}"
        told = f"{request}: stopped after step {self.progress.step} of {self.batches.steps}; {what}"
        self.log.write_end("interrupted", self.progress.step, told)
        self.log.close(None)
        self.lock.release()
        return Preempted(told)

    def see_to_checkpoints(self) -> None:
        """Save where it is time to, after the snapshots taken so far are on the disk. A collective call.

        A run that goes on from a checkpoint makes no snapshot of an earlier step again.

        Raises:
            ValueError: the run's folder was taken away.
        """
        if self.keeper.is_due:
            self.before_saving()
        self.keeper.step_ends()

    def before_saving(self) -> None:
        """Wait for the snapshots taken so far, and look whether the folder is still the run's own. A collective call.

        Raises:
            ValueError: the run's folder was taken away.
        """
        self.recorder.finish()
        check_still_held(self.lock, self.device)

    def measure_on_the_way(self) -> None:
        """Take the snapshot and make the evaluation that are due after the last step. A collective call.

        The first and the last step of a run have theirs in `start` and `finish`.
        """
        step = self.progress.step
        if self.due(self.config.analysis.every):
            check_still_held(self.lock, self.device)
            self.recorder.take(step)
        if self.due(self.config.train.eval_every):
            self.watch.on_the_way()

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps follows the last step; 0 stands for never."""
        step = self.progress.step
        return every > 0 and step % every == 0 and 0 < step < self.batches.steps

    def start(self) -> None:
        """Before the first step: check the model against the pre-trained one, measure it, keep its initial factors.

        A collective call.

        Raises:
            ValueError: the model at step 0 is not the pre-trained one, or the folder was taken away or cannot be
                written.
        """
        check_still_held(self.lock, self.device)
        progress = self.progress
        probe = self.batches.micro_batches(0)[0]
        base, start = self.beginning.checked_and_kept(
            self.engine, probe, self.config, self.loss_options, self.sequence, self.folder
        )
        if (evaluated := self.watch.at_start()) is not None:
            progress.eval_loss_start, progress.eval_losses_start = evaluated.loss, evaluated.by_source
        progress.base_loss, progress.start_loss = base, start

    def step(self, step: int) -> tuple[float, ReadyStep, StepReport]:
        """Make one optimizer step, number `step` from 0. A collective call.

        Returns:
            (mean loss per learned token, what all ranks have processed, the engine's report).

        Raises:
            StopRequest: a signal came; the weights are as they were.
        """
        self.engine.clock.enter("data")
        ready = self.ready.take(step)
        passes, learned = len(ready.micro_batches), ready.learned
        # DeepSpeed averages gradients over ranks and micro-batches; this makes it a mean over the batch's tokens.
        scale = collectives.world_size() * passes / learned
        summed = torch.zeros((), dtype=torch.float64, device=self.device)

        def losses() -> Iterator[Tensor]:
            for number, batch in enumerate(ready.micro_batches, start=1):
                self.engine.clock.enter("data")
                self.signals.check()
                if number == passes:
                    self.ready.count_ahead()
                moved = batch.to(self.device, non_blocking=True)
                self.engine.clock.enter("forward")
                loss, balance = training_losses(self.engine, moved, self.loss_options)
                summed.add_(loss.detach())
                yield loss * scale if balance is None else loss * scale + balance

        done = self.engine.train_step(losses(), passes, summed)
        return done.summed / learned, ready, done

    @property
    def progress(self) -> RunProgress:
        """How far the run is, and what it has measured once."""
        return self.keeper.progress

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.engine.device
