"""The training loop: a global batch, a step of the engine, a line in the log; from the first step to the report."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.data.batches import BatchPlan, eval_batches
from sorsa_ds.engine.engine import SorsaEngine, StepReport
from sorsa_ds.engine.gather import save_factors
from sorsa_ds.methods.registry import method_of
from sorsa_ds.model.adapter_file import INITIAL, TRAINED, describe, seal
from sorsa_ds.model.load import Loaded
from sorsa_ds.run.checkpoint.folder import existing
from sorsa_ds.run.checkpoint.keeper import PACKAGES, Keeper
from sorsa_ds.run.folder import RunLog
from sorsa_ds.run.paths import ADAPTER
from sorsa_ds.run.recorder import Recorder
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.console import bar, say
from sorsa_ds.runtime.folder_lock import RunLock
from sorsa_ds.runtime.process import memory_gib, peak_memory_gib
from sorsa_ds.runtime.stop_signals import Preempted, StopRequest, StopSignals
from sorsa_ds.train.loss import learned_tokens, mean_loss, summed_loss
from sorsa_ds.train.start_check import check_start, largest_gap


@dataclass(slots=True)
class Trainer:
    """One run, assembled by `sorsa_ds.train.setup`.

    plan: the micro-batches of every step, for this rank. eval_examples: held-out examples, possibly none.
    """

    config: RunConfig
    engine: SorsaEngine
    loaded: Loaded
    plan: BatchPlan
    eval_examples: list[dict]
    folder: Path
    log: RunLog
    keeper: Keeper
    recorder: Recorder
    lock: RunLock
    signals: StopSignals = field(init=False)

    def train(self) -> dict:
        """Train from the first step, or the one after the checkpoint, to the last; returns the report. A collective
        call.

        Raises:
            ValueError: the loss is no number, or the model at step 0 is not the pre-trained one; on every rank.
            Preempted: SIGTERM or SIGUSR1 came; the state is saved.
        """
        self.signals = StopSignals(timedelta(minutes=self.config.train.timeout_minutes))
        try:
            return self.run()
        except StopRequest as request:
            started = self.keeper.progress.base_loss is not None
            self.recorder.finish()
            where = f"all of it is in {self.keeper.save()}" if started else "there was nothing to save yet"
            self.log.close(None)
            self.lock.release()
            raise Preempted(
                f"{request}: stopped after step {self.keeper.progress.step} of {self.plan.steps}; {where}. The same "
                f"command with --resume auto goes on"
            ) from None
        finally:
            self.recorder.finish()

    def run(self) -> dict:
        """`train`, but for what a signal ends."""
        progress, adapter = self.keeper.progress, self.folder / ADAPTER
        if progress.base_loss is None:
            self.start(adapter)
        else:
            self.measure_on_the_way()
        losses = collectives.gather_lists(self.log.losses())
        with bar(self.plan.steps, "training", "step", progress.step) as shown:
            while (step := progress.step) < self.plan.steps:
                rate = self.engine.get_lr()[0]
                tick = time.perf_counter()
                self.keeper.step_begins()
                loss, tokens, done = self.step(step)
                seconds = time.perf_counter() - tick
                losses.append(loss)
                progress.step, progress.tokens = step + 1, progress.tokens + tokens
                progress.reg_loss = done.reg_loss
                self.log.write(
                    step + 1,
                    loss=loss,
                    learning_rate=rate,
                    grad_norm=done.grad_norm,
                    reg_loss=done.reg_loss,
                    reg_grad_norm=done.reg_grad_norm,
                    tokens_per_second=tokens / seconds,
                    memory_gib=memory_gib(),
                )
                reg = {} if done.reg_loss is None else {"reg": f"{done.reg_loss:.3g}"}
                shown.set_postfix(loss=f"{loss:.3f}", **reg, refresh=False)
                shown.update()
                progress.seconds += time.perf_counter() - tick
                tick = time.perf_counter()
                self.see_to_checkpoints()
                self.measure_on_the_way()
                progress.seconds += time.perf_counter() - tick

        eval_now = self.evaluate(self.plan.steps)
        self.recorder.finish()
        self.keeper.save()
        save_factors(self.engine, adapter / TRAINED)
        if collectives.rank() == 0:
            seal(adapter)
        tenth = max(1, len(losses) // 10)
        report = {
            "steps": self.plan.steps,
            "loss_first": sum(losses[:tenth]) / tenth,
            "loss_last": sum(losses[-tenth:]) / tenth,
            "base_loss": progress.base_loss,
            "start_loss": progress.start_loss,
            "eval_loss_start": progress.eval_loss_start,
            "eval_loss_end": eval_now,
            "reg_loss_end": progress.reg_loss,
            "method": self.config.method,
            "regularizer": self.engine.regularizer and asdict(self.engine.regularizer),
            "trainable_parameters": self.engine.trained_numbers,
            "train_seconds": progress.seconds,  # evaluations and saves included
            "tokens_per_second": progress.tokens / progress.seconds,
            "memory_gib": memory_gib(),
            "peak_memory_gib": max(collectives.gather_lists([peak_memory_gib()])),
            "world_size": collectives.world_size(),
            "versions": {name: version(name) for name in PACKAGES},
        }
        self.log.close(report)
        self.lock.release()
        return report

    def see_to_checkpoints(self) -> None:
        """Save if it is time, once the snapshots before are on the disk: a run that goes on from there makes no earlier
        ones again. A collective call."""
        if self.keeper.is_due:
            self.recorder.finish()
        self.keeper.step_ends()

    def measure_on_the_way(self) -> None:
        """What is due after the last step: a snapshot, an evaluation; start and end have theirs. A collective call."""
        step = self.keeper.progress.step
        if self.due(self.config.analysis.every):
            self.recorder.take(step)
        if self.due(self.config.train.eval_every):
            self.evaluate(step)

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, 0: never, follows the last step."""
        step = self.keeper.progress.step
        return every > 0 and step % every == 0 and 0 < step < self.plan.steps

    def start(self, adapter: Path) -> None:
        """Before the first step: check the model against the pre-trained one, measure it, keep its initial factors."""
        progress = self.keeper.progress
        gap = largest_gap(self.config.train.max_start_gap, self.config.residual.storage)
        base, start = check_start(self.engine, self.loaded, self.probe(), self.device, gap)
        say(f"Loss at step 0: {start:.6f}; the pre-trained model's: {base:.6f}.")
        if method_of(self.config).keeps_initial:
            save_factors(self.engine, adapter / INITIAL)
        if collectives.rank() == 0:
            describe(adapter, self.config, self.loaded.targets, self.loaded.digests)
        progress.eval_loss_start = self.evaluate(step=0)
        progress.base_loss, progress.start_loss = base, start

    def step(self, step: int) -> tuple[float, float, StepReport]:
        """One optimizer step: (mean loss per learned token, tokens processed by all ranks, the engine's report).

        Raises:
            ValueError: the loss is no number; on every rank, before it can reach the weights.
        """
        micro_batches = [self.to_device(batch) for batch in self.plan.micro_batches(step)]
        learned = collectives.total(sum(map(learned_tokens, micro_batches)), self.device).item()
        tokens = collectives.total(
            sum(int(batch["attention_mask"].sum()) for batch in micro_batches), self.device
        ).item()
        # DeepSpeed averages gradients over ranks and micro-batches; this makes it a mean over the batch's tokens.
        scale = collectives.world_size() * len(micro_batches) / learned
        summed = torch.zeros((), dtype=torch.float64, device=self.device)
        mean = 0.0

        def losses() -> Iterator[Tensor]:
            nonlocal mean
            for i, batch in enumerate(micro_batches, start=1):
                self.signals.check()
                loss = summed_loss(self.engine, batch)
                summed.add_(loss.detach())
                if i == len(micro_batches):
                    mean = collectives.total(summed, self.device).item() / learned
                    self.stop_on_nan(mean, "loss", step + 1)
                yield loss * scale

        done = self.engine.train_step(losses())
        return mean, tokens, done

    def evaluate(self, step: int) -> float | None:
        """Held-out loss, nats per learned token; None without held-out data. A collective call."""
        if not self.eval_examples:
            return None
        batches = eval_batches(
            self.eval_examples,
            collectives.rank(),
            collectives.world_size(),
            self.plan.micro_batch_size,
            self.plan.pad_token_id,
        )
        loss = mean_loss(self.engine, self.interruptible(batches), self.device)
        self.stop_on_nan(loss, "held-out loss", step)
        say(f"Step {step}: held-out loss {loss:.4f} nats per token.")
        self.log.write(step, eval_loss=loss)
        return loss

    def interruptible(self, batches: Iterator[dict]) -> Iterator[dict]:
        """The same, ended by a signal to stop."""
        for batch in batches:
            self.signals.check()
            yield batch

    def probe(self) -> dict[str, Tensor]:
        """The batch on which the model at step 0 is compared with the base model: this rank's first micro-batch."""
        return self.plan.micro_batches(0)[0]

    def stop_on_nan(self, loss: float, what: str, step: int) -> None:
        """Stop every rank alike (the loss is the same number on all) where it is NaN or infinite."""
        if not math.isfinite(loss):
            saved = existing(self.folder)
            kept = f"the last checkpoint is {saved[0]}" if saved else "nothing was saved before it"
            raise ValueError(
                f"the {what} is {loss} at step {step}: lower train.learning_rate (now "
                f"{self.config.train.learning_rate}) or look at the data of that step; {kept}"
            )

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.engine.device

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch on this rank's device."""
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
