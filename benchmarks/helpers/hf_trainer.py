"""The HF Trainer as one of several sides: its own loop, which waits before each step until it is its turn."""

import contextlib
import os
import tempfile
from threading import Semaphore, Thread

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from benchmarks.helpers.models import RATE

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
STEPS = 10_000
"""More steps than any benchmark takes."""


class TrainerSteps(TrainerCallback):
    """A call takes one step of a Trainer that runs in a thread of its own.

    A step is all that the Trainer does until the next one begins: forward, backward, clipping, optimizer, scheduler,
    bookkeeping and the next batch. The Trainer does not see the launcher's environment, as if it had been started by
    `python train.py` on one GPU: with that environment it would wrap the model in DDP.
    """

    def __init__(self, model: PreTrainedModel, rows: torch.Tensor, bf16: bool):
        """rows: token ids (sequences, length) of every step, all of them learned."""
        data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows]
        launched = {key: os.environ.pop(key) for key in LAUNCHER if key in os.environ}
        try:
            self._trainer = self._make(model, data, bf16)
        finally:
            os.environ |= launched
        self._go, self._done = Semaphore(0), Semaphore(0)
        self._within, self._entered = contextlib.nullcontext(), contextlib.ExitStack()
        self._begun = 0
        self._failure: BaseException | None = None
        Thread(target=self._train, daemon=True).start()

    def _make(self, model: PreTrainedModel, data: list[dict], bf16: bool) -> Trainer:
        with tempfile.TemporaryDirectory() as folder:  # the Trainer asks for a folder, and writes nothing into it
            arguments = TrainingArguments(
                output_dir=folder, per_device_train_batch_size=len(data), max_steps=STEPS, learning_rate=RATE,
                lr_scheduler_type="cosine", bf16=bf16, report_to="none", save_strategy="no", logging_strategy="no",
                optim="adamw_torch_fused", use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
            )  # fmt: skip
            made = Trainer(model, arguments, train_dataset=data * 100, callbacks=[self])
        assert PartialState().distributed_type == DistributedType.NO, "the Trainer would not run by itself"
        return made

    def __call__(self, within: contextlib.AbstractContextManager | None = None) -> None:
        """Take one step. within: a context that the step runs in, entered on the Trainer's thread."""
        self._within = within or contextlib.nullcontext()
        self._go.release()
        self._done.acquire()
        if self._failure is not None:
            raise self._failure

    def _train(self) -> None:
        try:
            self._trainer.train()
        except BaseException as failure:
            self._failure = failure
        finally:
            self._done.release()

    def on_step_begin(self, *_, **__) -> None:
        """Report that the step before is over, and wait for the turn."""
        if self._begun:
            self._done.release()
        self._begun += 1
        self._go.acquire()
        self._entered.enter_context(self._within)

    def on_step_end(self, *_, **__) -> None:
        """Leave the context, after the optimizer's and the scheduler's step."""
        self._entered.close()
