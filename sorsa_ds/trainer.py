"""The training loop: a global batch, a step of the engine, a line in the log; from the first step to the report."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from sorsa_ds import comm
from sorsa_ds.adapter import INITIAL, TRAINED, describe
from sorsa_ds.config import RunConfig
from sorsa_ds.console import bar, say
from sorsa_ds.data.batches import BatchPlan, eval_batches
from sorsa_ds.engine import SorsaEngine, StepReport
from sorsa_ds.loading import Loaded
from sorsa_ds.objective import learned_tokens, mean_loss, summed_loss
from sorsa_ds.process import memory_gib
from sorsa_ds.run_folder import ADAPTER, RunLog
from sorsa_ds.save_factors import save_factors
from sorsa_ds.start_check import check_start


@dataclass(slots=True)
class Trainer:
    """One run, assembled by `sorsa_ds.assemble`.

    plan: the micro-batches of every step, for this rank. eval_examples: held-out examples, possibly none.
    """

    config: RunConfig
    engine: SorsaEngine
    loaded: Loaded
    plan: BatchPlan
    eval_examples: list[dict]
    folder: Path
    log: RunLog

    def train(self) -> dict:
        """Train from the first step to the last; returns the report. A collective call.

        Raises:
            ValueError: the loss is no number, or the model at step 0 is not the pre-trained one; on every rank.
        """
        base, start = check_start(self.engine, self.loaded, self.probe(), self.device, self.config.train.max_start_gap)
        say(f"Loss at step 0: {start:.6f}; the pre-trained model's: {base:.6f}.")
        adapter = self.folder / ADAPTER
        save_factors(self.engine, adapter / INITIAL)
        if comm.rank() == 0:
            describe(adapter, self.config, self.loaded.targets, self.loaded.digests)
        eval_start = eval_now = self.evaluate(step=0)

        losses: list[float] = []
        began = time.perf_counter()
        tokens_seen = 0.0
        with bar(self.plan.steps, "training", "step") as progress:
            for step in range(self.plan.steps):
                rate = self.engine.get_lr()[0]
                tick = time.perf_counter()
                loss, tokens, done = self.step(step)
                seconds = time.perf_counter() - tick
                losses.append(loss)
                tokens_seen += tokens
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
                progress.set_postfix(loss=f"{loss:.3f}", reg=f"{done.reg_loss:.3g}", refresh=False)
                progress.update()
                if self.due(self.config.output.save_every, step):
                    save_factors(self.engine, self.folder / "checkpoints" / f"step-{step + 1:06d}" / TRAINED)
                if self.due(self.config.train.eval_every, step):
                    eval_now = self.evaluate(step + 1)
        seconds = time.perf_counter() - began

        if not self.due(self.config.train.eval_every, self.plan.steps - 1):
            eval_now = self.evaluate(self.plan.steps)
        save_factors(self.engine, adapter / TRAINED)
        tenth = max(1, len(losses) // 10)
        report = {
            "steps": self.plan.steps,
            "loss_first": sum(losses[:tenth]) / tenth,
            "loss_last": sum(losses[-tenth:]) / tenth,
            "base_loss": base,
            "start_loss": start,
            "eval_loss_start": eval_start,
            "eval_loss_end": eval_now,
            "reg_loss_end": done.reg_loss,
            "trainable_parameters": sum(target.trainable for target in self.loaded.targets),
            "train_seconds": seconds,  # evaluations and saves included
            "tokens_per_second": tokens_seen / seconds,
            "memory_gib": memory_gib(),
            "world_size": comm.world_size(),
            "versions": {name: version(name) for name in ("sorsa_ds", "torch", "deepspeed", "transformers")},
        }
        self.log.close(report)
        return report

    def step(self, step: int) -> tuple[float, float, StepReport]:
        """One optimizer step: (mean loss per learned token, tokens processed by all ranks, the engine's report).

        Raises:
            ValueError: the loss is no number; on every rank, before it can reach the weights.
        """
        micro_batches = [self.to_device(batch) for batch in self.plan.micro_batches(step)]
        learned = comm.total(sum(map(learned_tokens, micro_batches)), self.device).item()
        tokens = comm.total(sum(int(batch["attention_mask"].sum()) for batch in micro_batches), self.device).item()
        # DeepSpeed averages gradients over ranks and micro-batches; this makes it a mean over the batch's tokens.
        scale = comm.world_size() * len(micro_batches) / learned
        summed = torch.zeros((), dtype=torch.float64, device=self.device)
        mean = 0.0

        def losses() -> Iterator[Tensor]:
            nonlocal mean
            for i, batch in enumerate(micro_batches, start=1):
                loss = summed_loss(self.engine, batch)
                summed.add_(loss.detach())
                if i == len(micro_batches):
                    mean = comm.total(summed, self.device).item() / learned
                    self.stop_on_nan(mean, "loss", step + 1)
                yield loss * scale

        done = self.engine.train_step(losses())
        return mean, tokens, done

    def evaluate(self, step: int) -> float | None:
        """Held-out loss, nats per learned token; None without held-out data. A collective call."""
        if not self.eval_examples:
            return None
        batches = eval_batches(
            self.eval_examples, comm.rank(), comm.world_size(), self.plan.micro_batch_size, self.plan.pad_token_id
        )
        loss = mean_loss(self.engine, batches, self.device)
        self.stop_on_nan(loss, "held-out loss", step)
        say(f"Step {step}: held-out loss {loss:.4f} nats per token.")
        self.log.write(step, eval_loss=loss)
        return loss

    def probe(self) -> dict[str, Tensor]:
        """The batch on which the model at step 0 is compared with the base model: this rank's first micro-batch."""
        return self.plan.micro_batches(0)[0]

    def stop_on_nan(self, loss: float, what: str, step: int) -> None:
        """Stop every rank alike (the loss is the same number on all) where it is NaN or infinite."""
        if not math.isfinite(loss):
            saved = sorted((self.folder / "checkpoints").glob("step-*"))
            kept = f"the last factors that were saved are in {saved[-1]}" if saved else "nothing was saved before it"
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

    def due(self, every: int, step: int) -> bool:
        """Whether something done every so many steps follows this step (0-based)."""
        return every > 0 and (step + 1) % every == 0
