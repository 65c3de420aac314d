"""The orthonormal regulariser in Hugging Face's Trainer, and so in TRL's trainers (SORSA, eq. 10 and 11).

    average -> clip grad L_train -> + (gamma / eta_d) grad L_reg -> optimizer -> scheduler

The Trainer calls `on_pre_optimizer_step` between its clip and its optimizer, which is where the term belongs: the clip
does not see it, and the optimizer multiplies it by eta_t as everything else. DeepSpeed has taken its step by then,
inside of the backward pass; there the term enters through a hook of its inner optimizer, as in the trainer of this
package.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch.amp.grad_scaler import OptState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sorsa_ds.config.method_settings import RegularizerConfig
from sorsa_ds.sorsa.regularizer import Regularizer, follows_rate, resolve_regularizer

if TYPE_CHECKING:
    from transformers import Trainer

    from sorsa_ds.engine.regularize import ShardedRegularizer

L_REG = "l_reg"
"""What the log calls the regulariser's value."""


class SorsaCallback(TrainerCallback):
    """Adds the regulariser's gradient to that of the loss, in every optimizer step, and L_reg to the log.

    eta_d is the learning rate that the optimizer's schedule multiplies: the Trainer's `learning_rate`, or
    that of an optimizer of the user's own. It works on one device, with DDP, and with DeepSpeed on ZeRO stages 0 to 3,
    in fp32, bf16, and fp16 with its loss scaling. Trackers see L_reg after `log_to_trackers`.

    Args:
        gamma: strength of the regulariser: a number, or one relative to the learning rate, such as `0.2*lr`. None: the
            preset's. 0: L_reg is logged, and nothing is added.
        preset, form, reduction, divide_by_accumulation: the settings of these names in the section `regularizer` of
            `sorsa train`.

    Attributes:
        l_reg: the regulariser's value before the last step; None before the first.

    Raises:
        ValueError: gamma is no such number.
    """

    def __init__(
        self,
        gamma: float | str | None = None,
        *,
        preset: str = "default",
        form: str | None = None,
        reduction: str | None = None,
        divide_by_accumulation: bool | int | None = None,
    ):
        options: dict[str, Any] = {"preset": preset, "form": form, "reduction": reduction, "gamma": gamma}
        self.config = RegularizerConfig(**options, divide_by_accumulation=divide_by_accumulation)
        self.regularizer: Regularizer | None = None
        self._trained: list[torch.nn.Parameter] = []
        self._of_parameters: ShardedRegularizer | None = None
        self._hook: Any = None
        self._due = False
        self._value: torch.Tensor | None = None

    @property
    def l_reg(self) -> float | None:
        return None if self._value is None else self._value.item()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the factors, and the learning rate that they are trained with.

        Raises:
            ValueError: the model has no trained U and V, training cuts them in a way that is not supported, or gamma is
                a number and there is not one learning rate to divide it by.
        """
        from sorsa_ds.peft import regularised  # it imports DeepSpeed, which takes seconds

        self._forget()
        optimizer, in_masters = kwargs["optimizer"], regularised.under_deepspeed()
        trained = regularised.trained_factors(kwargs["model"])
        rate = args.learning_rate
        if not follows_rate(self.config):
            rate = _only_rate(optimizer, None if in_masters else list(trained.values()))
        self.regularizer = resolve_regularizer(
            self.config, learning_rate=rate, accumulation_steps=args.gradient_accumulation_steps
        )
        if in_masters:
            self._hook = regularised.regulariser_of_masters(
                kwargs["model"], optimizer.optimizer, self.regularizer, self._prepare
            )
        else:
            self._trained = list(trained.values())
            self._of_parameters = regularised.regulariser_of_parameters(trained, self.regularizer)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Another optimizer step begins, in which L_reg is to be computed once."""
        self._due = True

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the term, unless a hook has done so.

        Raises:
            ValueError: the gradients still have fp16's loss scale.
        """
        if self._of_parameters is None:
            return
        _check_unscaled(kwargs["optimizer"])
        self._prepare(self._of_parameters)
        for factor in self._trained:
            if factor.grad is None:  # no loss came by this layer; U and V are kept orthonormal all the same
                factor.grad = torch.zeros_like(factor)
        self._of_parameters.add_to(self._trained)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put L_reg into the log's last line. Callbacks that come behind this one see it too."""
        logs = kwargs.get("logs")
        if logs is not None and "loss" in logs and self.l_reg is not None:
            logs[L_REG] = self.l_reg
            state.log_history[-1][L_REG] = self.l_reg

    @staticmethod
    def log_to_trackers(trainer: "Trainer") -> None:
        """Let the trackers of a trainer see L_reg: its SorsaCallback comes before theirs from now on.

        A Trainer puts those of `report_to` before all that it is given, and each gets a line of the log in that order.

        Raises:
            ValueError: the trainer has no SorsaCallback.
        """
        callbacks = trainer.callback_handler.callbacks
        own = [callback for callback in callbacks if isinstance(callback, SorsaCallback)]
        if not own:
            raise ValueError("SorsaCallback.log_to_trackers: give the trainer callbacks=[SorsaCallback()] first")
        callbacks[:] = [*own, *(callback for callback in callbacks if callback not in own)]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the parameters; the value of the last step stays."""
        self._forget()

    def _prepare(self, regulariser: "ShardedRegularizer") -> None:
        """Compute L_reg and its gradient's factors, once per optimizer step."""
        if self._due:
            self._due = False
            self._value, _ = regulariser.prepare()

    def _forget(self) -> None:
        """Remove what an earlier training has left."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._of_parameters = None
        self._trained = []


def _only_rate(optimizer: Any, factors: list[torch.nn.Parameter] | None) -> float:
    """The learning rate eta_d of the groups of an optimizer that train U and V.

    Args:
        factors: U and V. None: an optimizer's groups hold masters in their place, and all groups count.

    Raises:
        ValueError: the groups have several learning rates, or their learning rate is 0.
    """
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner  # accelerate's, around DeepSpeed's, around PyTorch's
    wanted = None if factors is None else {id(factor) for factor in factors}
    rates = {
        _base_rate(group, optimizer)
        for group in optimizer.param_groups
        if wanted is None or any(id(parameter) in wanted for parameter in group["params"])
    }
    if len(rates) == 1 and (rate := rates.pop()) > 0:
        return rate
    found = f"the optimizer has {len(rates)} learning rates" if rates else "the learning rate is 0"
    raise ValueError(
        f"SorsaCallback: {found}, and gamma is a number, which is divided by the one learning rate of U and V: give "
        f"gamma relative to the rate, such as SorsaCallback(gamma='0.2*lr')"
    )


def _base_rate(group: dict[str, Any], optimizer: Any) -> float:
    """The learning rate that a schedule multiplies: the group's own is that of the first step, which may be 0."""
    for name in ("max_lr", "initial_lr"):
        if name in group:
            return float(group[name])
    return float(getattr(optimizer, "defaults", group).get("lr", group["lr"]))


def _check_unscaled(optimizer: Any) -> None:
    """Stop where gradients have fp16's loss scale: the term has none, and would be divided by it.

    The Trainer removes the scale when it computes the gradients' norm, which it always does.

    Raises:
        ValueError: the gradients have fp16's loss scale.
    """
    scaler = getattr(optimizer, "scaler", None)
    if scaler is not None and scaler.is_enabled():
        states = scaler._per_optimizer_states
        if states[id(optimizer.optimizer)]["stage"] is not OptState.UNSCALED:
            raise ValueError(
                "SorsaCallback: the gradients still have fp16's loss scale when the optimizer is about to step. This "
                "trainer does not unscale them before `on_pre_optimizer_step`: train in bf16 or fp32"
            )
