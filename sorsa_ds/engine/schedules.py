"""The learning rate's schedules: those of `transformers.get_scheduler`, number for number."""

import functools
import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sorsa_ds.config.train_settings import TrainConfig


def schedule(train: TrainConfig, steps: int) -> Callable[[Optimizer], LambdaLR]:
    """A function that makes the scheduler of a run of so many optimizer steps from its optimizer."""
    warmup_steps = min(round(train.warmup_ratio * steps), steps - 1)
    if train.schedule == "cosine":
        return cosine_with_warmup(steps, warmup_steps)
    its_own = {
        "cosine_with_min_lr": {"min_lr_rate": train.min_lr_ratio},
        "warmup_stable_decay": {
            "num_decay_steps": min(round(train.decay_ratio * steps), steps - warmup_steps),
            "min_lr_ratio": train.min_lr_ratio,
        },
    }

    def make(optimizer: Optimizer) -> LambdaLR:
        from transformers import get_scheduler  # its import takes seconds, as `cosine_with_warmup` says

        return get_scheduler(train.schedule, optimizer, warmup_steps, steps, its_own.get(train.schedule))

    return make


def described(train: TrainConfig) -> str:
    """The schedule in a clause for the run's table."""
    warmup = "" if train.schedule == "constant" else f", warm-up in {train.warmup_ratio:.3g} of the steps"
    decay = f", decay in the last {train.decay_ratio:.3g}" if train.schedule == "warmup_stable_decay" else ""
    floor = f", down to {train.min_lr_ratio * train.peak_rate:g}" if train.min_lr_ratio else ""
    return f"{train.peak_rate:g}, {train.schedule}{warmup}{decay}{floor}"


def cosine_with_warmup(steps: int, warmup_steps: int) -> Callable[[Optimizer], LambdaLR]:
    """A function that makes an optimizer's scheduler: linear warm-up to eta_d, then a cosine to 0 at the last step.

    It is transformers' `get_cosine_schedule_with_warmup`. Importing that takes a fifth of a run's start, because peft,
    bitsandbytes and PyTorch's compiler come with it.
    """

    def share(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))

    return functools.partial(LambdaLR, lr_lambda=share)
