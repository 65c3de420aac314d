"""SorsaEngine: DeepSpeed's engine with the regulariser in its step (SORSA, eq. 10 and 11).

    accumulate, reduce  ->  clip grad L_train  ->  + (gamma / eta_d) grad L_reg  ->  AdamW  ->  scheduler
                                          (every so many steps: U and V made orthonormal after AdamW)

The regulariser enters through a pre-hook of the inner torch optimizer's step: on every ZeRO stage that is the one
place where DeepSpeed shows the fp32 masters together with averaged, unscaled and clipped gradients. (A second backward
would not do: under ZeRO-3 it silently overwrites the first one's gradients.) A post-hook of the same step makes U and V
orthonormal again where that is asked for: the masters have moved, and are not in the model yet.
"""

from dataclasses import dataclass

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from sorsa_ds.config.deepspeed_json import fit_buckets
from sorsa_ds.engine.grams import ShardedGrams
from sorsa_ds.engine.masters import inner_optimizer, inner_steps, locate, trained_shapes
from sorsa_ds.engine.regularize import ShardedRegularizer
from sorsa_ds.engine.reorthonormalize import Reorthonormalizer
from sorsa_ds.model.sharding import Part
from sorsa_ds.sorsa.regularizer import Regularizer


@dataclass(slots=True)
class StepReport:
    """What one optimizer step did. Norms are taken over the whole model.

    grad_norm: of grad L_train, before the clip. reg_loss: L_reg before the step. reg_grad_norm: of the added term;
    both None without a regulariser.
    """

    grad_norm: float
    reg_loss: float | None = None
    reg_grad_norm: float | None = None


class SorsaEngine(DeepSpeedEngine):
    """A DeepSpeed engine that trains SORSA factors with the orthonormal regulariser on any ZeRO stage.

    Args:
        model: a model with SorsaLinear layers, or any other; on ZeRO-3 partitioned already (`sorsa_ds.model.load`).
        ds_config: the resolved DeepSpeed configuration (`sorsa_ds.config.deepspeed_json`).
        optimizer: makes the optimizer from the trainable parameters.
        scheduler: makes the learning rate scheduler from the optimizer.
        regularizer: with coefficient 0 it still measures L_reg, and adds nothing. None: there are no U and V.
        exact_factors: fp32 values from which masters start where the model's own parameters are rounded to bf16.
    """

    def __init__(
        self,
        model: nn.Module,
        ds_config: dict,
        optimizer,
        scheduler,
        regularizer: Regularizer | None,
        exact_factors: dict[str, Part],
    ):
        trained = [p for p in model.parameters() if p.requires_grad]
        ds_config = fit_buckets(ds_config, sum(getattr(p, "ds_numel", p.numel()) for p in trained))
        super().__init__(
            args=None,
            model=model,
            optimizer=optimizer,
            model_parameters=trained,
            lr_scheduler=scheduler,
            config=ds_config,
            config_class=deepspeed.runtime.config.DeepSpeedConfig(ds_config),
        )
        inner = inner_optimizer(self)
        self.masters = locate(self)
        self.trained_shapes = trained_shapes(self)
        for fragment in self.masters.fragments:
            if (part := exact_factors.get(fragment.name)) is not None:
                first = fragment.start - part.start
                fragment.values().copy_(part.values[first : first + fragment.numel])
        self._regularizer = self._reg_values = None
        if regularizer is not None:
            grams = ShardedGrams(self.masters, self.trained_shapes, self.device)
            self._regularizer = ShardedRegularizer(regularizer, grams)
            inner.register_step_pre_hook(self._add_regularizer)
            if regularizer.reorthonormalize:
                self._reorthonormalizer = Reorthonormalizer(grams, self.masters, inner.state)
                self._inner_steps = inner_steps(self)
                inner.register_step_post_hook(self._reorthonormalize)
        for state in inner.state.values():
            # Some wrappers allocate the moments by one step on zero gradients; Adam must not count it.
            state["step"].zero_()

    def train_step(self, losses) -> StepReport:
        """Backward over an iterable of micro-batch losses (one per accumulation step), then one optimizer step.

        Each loss is consumed before the next is computed. The gradients are averaged over ranks and micro-batches.
        """
        before = self.global_steps
        for loss in losses:
            self.backward(loss)
            self.step()
        assert self.global_steps == before + 1, "train_step needs gradient_accumulation_steps losses"
        terms = [] if self._reg_values is None else [number.item() for number in self._reg_values]
        return StepReport(float(self.get_global_grad_norm()), *terms)

    @property
    def trained_numbers(self) -> int:
        """How many numbers are trained."""
        return sum(shape.numel() for shape in self.trained_shapes.values())

    def method_state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold beside values and moments, alike on every rank."""
        return {}

    def restore_method_state(self, state: dict[str, torch.Tensor]) -> None:
        """Put `method_state` back."""
        assert not state, "of another method"

    def continue_after(self, steps: int, scheduler_state: dict) -> None:
        """Set every counter to what it is after so many optimizer steps."""
        self.lr_scheduler.load_state_dict(scheduler_state)
        for group, rate in zip(self.lr_scheduler.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        self.global_steps = steps
        self.global_samples = steps * self.train_batch_size()
        self.micro_steps = steps * self.gradient_accumulation_steps()

    @property
    def regularizer(self) -> Regularizer | None:
        """As every step applies it; None where there are no U and V."""
        return self._regularizer and self._regularizer.regularizer

    def clip_fp32_gradients(self) -> None:
        """Stage 0 in fp32: clip, and keep the norm, which DeepSpeed would drop."""
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        self._global_grad_norm = nn.utils.clip_grad_norm_(parameters, self.gradient_clipping())

    def _take_model_step(self, lr_kwargs) -> None:
        """Called once an optimizer step, before the clip: L_reg is taken on all masters while none has moved."""
        self._inner_steps_taken = 0
        if self._regularizer is not None:
            self._reg_values = self._regularizer.prepare()
        if self.gradient_clipping() == 0 and not (self.zero_optimization() or self.bfloat16_enabled()):
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._global_grad_norm = nn.utils.get_total_norm(gradients)
        super()._take_model_step(lr_kwargs)

    def _add_regularizer(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        """Pre-hook of the inner optimizer's step; on ZeRO-3 it runs once a sub-group."""
        for group in optimizer.param_groups:
            for master in group["params"]:
                self._regularizer.add_to(master)

    def _reorthonormalize(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        """Post-hook of the inner optimizer's step: all masters must have moved. ZeRO-3 has copied those of the earlier
        sub-groups into the model by then: they are copied again. What persists on all ranks it gathers afterwards."""
        self._inner_steps_taken += 1
        due = (self.global_steps + 1) % self._regularizer.regularizer.reorthonormalize == 0
        if due and self._inner_steps_taken == self._inner_steps:
            self._reorthonormalizer.apply()
            for sub_group in range(self._inner_steps - 1):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)


def adamw(rate: float, betas: tuple[float, float], epsilon: float, weight_decay: float):
    """A function that makes the one AdamW from the trainable parameters."""

    def make(parameters) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            list(parameters), lr=rate, betas=betas, eps=epsilon, weight_decay=weight_decay, fused=True
        )

    return make


def cosine_with_warmup(steps: int, warmup_steps: int):
    """A function that makes the one scheduler: linear warm-up to eta_d, then a cosine to 0 at the last step."""

    def make(optimizer: torch.optim.Optimizer):
        return get_cosine_schedule_with_warmup(optimizer, warmup_steps, steps)

    return make
