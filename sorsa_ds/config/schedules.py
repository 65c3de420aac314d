"""The names of the learning rate's schedules, and which settings belong to which of them."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sorsa_ds.config.train_settings import TrainConfig

ScheduleName = Literal[
    "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_min_lr", "warmup_stable_decay"
]
"""Names of `transformers.get_scheduler`, where each means the same."""

_USERS = {
    "warmup_ratio": ("cosine", "linear", "constant_with_warmup", "cosine_with_min_lr", "warmup_stable_decay"),
    "min_lr_ratio": ("cosine_with_min_lr", "warmup_stable_decay"),
    "decay_ratio": ("warmup_stable_decay",),
}
"""Which schedules use a setting."""


def check_schedule(train: "TrainConfig") -> None:
    """Stop where a setting is given that the schedule has no use for, or one is missing or too large.

    Raises:
        ValueError: naming the settings.
    """
    for name, users in _USERS.items():
        value, default = getattr(train, name), type(train).__dataclass_fields__[name].default
        if train.schedule not in users and value not in (0, default):
            raise ValueError(
                f"train.{name}={value}: train.schedule={train.schedule} has no use for it; leave it out, or take "
                f"{' or '.join(users)}"
            )
    if train.schedule == "cosine_with_min_lr" and train.min_lr_ratio == 0:
        raise ValueError("train.schedule=cosine_with_min_lr ends at train.min_lr_ratio of the learning rate: set it")
    if train.schedule == "warmup_stable_decay" and train.warmup_ratio + train.decay_ratio > 1:
        raise ValueError(
            f"train.warmup_ratio={train.warmup_ratio} and train.decay_ratio={train.decay_ratio} are more than all steps"
        )
