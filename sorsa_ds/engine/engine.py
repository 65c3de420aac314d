"""SorsaEngine: DeepSpeed's engine with the regulariser in its step (SORSA, eq. 10 and 11).

    accumulate, reduce  ->  clip grad L_train  ->  + (gamma / eta_d) grad L_reg  ->  AdamW  ->  scheduler
                            (where set, after AdamW: rates of single columns; U and V made orthonormal)

The regulariser enters through a pre-hook of the inner torch optimizer's step. On every ZeRO stage that is the one
place where DeepSpeed shows the fp32 masters together with averaged, unscaled and clipped gradients. A second backward
pass would not do: under ZeRO-3 it silently overwrites the gradients of the first. Where the settings ask for it, a
post-hook of the same step makes U and V orthonormal again: the masters have then moved, and have not yet been copied
into the model.
"""

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime import compiler
from deepspeed.runtime.zero.leaf_module_config import DEFAULT_LEAF_MODULE_CLASSES
from deepspeed.utils import z3_leaf_module
from torch import nn

from sorsa_ds.config.deepspeed_json import fit_buckets
from sorsa_ds.config.method_settings import SorsaConfig
from sorsa_ds.engine.factor_rates import FactorRates
from sorsa_ds.engine.grams import ShardedGrams
from sorsa_ds.engine.masters import inner_optimizer, inner_steps, locate_masters, trained_shapes
from sorsa_ds.engine.persistent import gather_persistent_at_once
from sorsa_ds.engine.regularize import ShardedRegularizer
from sorsa_ds.engine.reorthonormalize import Reorthonormalizer
from sorsa_ds.model.sharding import Part
from sorsa_ds.runtime import collectives
from sorsa_ds.runtime.step_clock import StepClock
from sorsa_ds.sorsa.expert_layer import SorsaExperts
from sorsa_ds.sorsa.layer import SorsaLinear
from sorsa_ds.sorsa.regularizer import Regularizer
from sorsa_ds.sorsa.sides import keep_sides


@dataclass(slots=True)
class StepReport:
    """What one optimizer step did. Norms are taken over the whole model.

    grad_norm: the norm of grad L_train before it is clipped.
    summed: the sum over all ranks of the number that the losses have added to.
    reg_loss: L_reg before the step; None without a regulariser.
    reg_grad_norm: the norm of the added term (gamma / eta_d) grad L_reg; None without a regulariser.
    """

    grad_norm: float
    summed: float
    reg_loss: float | None = None
    reg_grad_norm: float | None = None


class SorsaEngine(DeepSpeedEngine):
    """A DeepSpeed engine that trains SORSA factors with the orthonormal regulariser on any ZeRO stage.

    Args:
        model: a model with SorsaLinear layers, or any other; on ZeRO-3 it is partitioned already
            (`sorsa_ds.model.load`).
        ds_config: the resolved DeepSpeed configuration (`sorsa_ds.config.deepspeed_json`).
        optimizer: makes the optimizer from the trainable parameters.
        scheduler: makes the learning rate scheduler from the optimizer.
        regularizer: None for a model without U and V. With coefficient 0, L_reg is measured and nothing is added.
        exact_factors: fp32 values with which masters begin where the model's own parameters are rounded to bf16.
        rates: the settings of columns and singular values that learn with rates of their own.
    """

    moments_like_masters = True
    """Whether AdamW's moments are laid out like the masters; else they are part of `method_state`."""

    def __init__(
        self,
        model: nn.Module,
        ds_config: dict,
        optimizer,
        scheduler,
        regularizer: Regularizer | None,
        exact_factors: dict[str, Part],
        rates: SorsaConfig | None = None,
    ):
        trained = [p for p in model.parameters() if p.requires_grad]
        ds_config = fit_buckets(ds_config, sum(getattr(p, "ds_numel", p.numel()) for p in trained))
        _import_muon()
        if ds_config.get("zero_optimization", {}).get("stage") == 3:
            _let_gradients_into_leaves(model)
        super().__init__(
            args=None,
            model=model,
            optimizer=optimizer,
            model_parameters=trained,
            lr_scheduler=scheduler,
            config=ds_config,
            config_class=deepspeed.runtime.config.DeepSpeedConfig(ds_config),
        )
        if self.zero_optimization_stage() == 3:
            gather_persistent_at_once(self)
        inner = inner_optimizer(self)
        self.clock = StepClock(self.device)
        self.masters = locate_masters(self)
        self.trained_shapes = trained_shapes(self)
        for fragment in self.masters.fragments:
            if (part := exact_factors.get(fragment.name)) is not None:
                first = fragment.start - part.start
                fragment.values().copy_(part.values[first : first + fragment.numel])
        layers = [module for module in model.modules() if isinstance(module, SorsaLinear | SorsaExperts)]
        self._whole_layers = layers if self.zero_optimization_stage() < 3 else []
        self._rates: FactorRates | None = None
        if rates is not None and rates.has_own_rates:
            self._rates = FactorRates(rates, self.masters, self.trained_shapes, self.device)
            inner.register_step_pre_hook(self._begin_rates)
            inner.register_step_post_hook(self._end_rates)
        self._regularizer: ShardedRegularizer | None = None
        self._reg_values: tuple[torch.Tensor, torch.Tensor] | None = None
        if regularizer is not None:
            grams = ShardedGrams(self.masters, self.trained_shapes, self.device)
            self._regularizer = ShardedRegularizer(regularizer, grams)
            inner.register_step_pre_hook(self._add_regularizer)
            if regularizer.reorthonormalize:
                self._reorthonormalizer = Reorthonormalizer(grams, self.masters, inner.state)
                self._inner_steps = inner_steps(self)
                inner.register_step_post_hook(self._reorthonormalize)
        for state in inner.state.values():
            # Some wrappers allocate the moments by a step on zero gradients, which Adam must not count.
            state["step"] = state["step"] * 0  # a tensor, or bitsandbytes' int

    def train_step(
        self, losses: Iterator[torch.Tensor], passes: int | None = None, summed: torch.Tensor | None = None
    ) -> StepReport:
        """Make a backward pass from each micro-batch loss, then one optimizer step.

        The gradients are averaged over ranks and micro-batches.

        Args:
            losses: computes one loss after the other, as many on every rank, each when it is asked for: its forward
                pass then has the sides that layers keep for the step, as its recomputation in the backward pass has.
            passes: how many they are. None: one per accumulation step.
            summed: a number (0-D, float64) that the losses add to; its sum over all ranks comes with the report.
        """
        assert isinstance(losses, Iterator), "losses are computed inside of a step, by a generator"
        before = self.global_steps
        passes = self.gradient_accumulation_steps() if passes is None else passes
        with ExitStack() as unmoved:
            unmoved.enter_context(self.kept_sides())
            for number, loss in enumerate(losses, start=1):
                self.set_gradient_accumulation_boundary(number == passes)
                self.clock.enter("backward")
                self.backward(loss / passes, scale_wrt_gas=False)
                self.clock.enter("step")
                if number == passes:
                    unmoved.close()  # the step moves the masters
                self.step()
        self.clock.leave()
        assert self.global_steps == before + 1, f"train_step needs {passes} losses"
        norm = torch.as_tensor(self.get_global_grad_norm(), dtype=torch.float64, device=self.device)
        total = torch.zeros_like(norm) if summed is None else collectives.total(summed, self.device)
        # One wait for the device. ZeRO-3 needs it: its next gathers do not wait for the copies of the new masters.
        return StepReport(*torch.stack([norm, total, *(self._reg_values or ())]).tolist())

    def kept_sides(self) -> AbstractContextManager[None]:
        """Context in which the factors do not move, and so layers have their sides at hand where ZeRO lets them."""
        return keep_sides(self._whole_layers, self.product_dtype)

    @property
    def product_dtype(self) -> torch.dtype | None:
        """The dtype of the matrix products, that of torch.autocast; None where it is off."""
        return self.torch_autocast_dtype() if self.torch_autocast_enabled() else None

    @property
    def trained_numbers(self) -> int:
        """How many numbers are trained, over all ranks."""
        return sum(shape.numel() for shape in self.trained_shapes.values())

    def method_state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold beside the values and moments; the same on every rank."""
        return {} if self._rates is None else {"initial_s": self._rates.initial_s}

    def restore_method_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `method_state` returned when the checkpoint was made."""
        assert set(state) == set(self.method_state()), "the checkpoint was made by another method"
        if self._rates is not None:
            self._rates.initial_s = state["initial_s"]

    def continue_after(self, steps: int, scheduler_state: dict) -> None:
        """Set all counters and the learning rate to what they are after so many optimizer steps.

        The rate is computed anew, since the run may have become longer than when the state was saved.
        """
        scheduler = self.lr_scheduler
        scheduler.load_state_dict(scheduler_state)
        pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        scheduler._last_lr = [rate * share(scheduler.last_epoch) for rate, share in pairs]
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        self.global_steps = steps
        self.global_samples = steps * self.train_batch_size()
        self.micro_steps = steps * self.gradient_accumulation_steps()

    @property
    def regularizer(self) -> Regularizer | None:
        """The regulariser that every step applies; None for a model without U and V."""
        return None if self._regularizer is None else self._regularizer.regularizer

    def clip_fp32_gradients(self) -> None:
        """Clip the gradients on stage 0 in fp32. DeepSpeed's own method does not keep their norm; this one does."""
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        self._global_grad_norm = nn.utils.clip_grad_norm_(parameters, self.gradient_clipping())

    def _take_model_step(self, lr_kwargs) -> None:
        """Measure L_reg, then take the step. DeepSpeed calls this once per optimizer step, before the clip."""
        self._inner_steps_taken = 0
        if self._regularizer is not None:
            self._reg_values = self._regularizer.prepare()
        if self.gradient_clipping() == 0 and not (self.zero_optimization() or self.bfloat16_enabled()):
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._global_grad_norm = nn.utils.get_total_norm(gradients)
        super()._take_model_step(lr_kwargs)

    def _add_regularizer(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        """Add the regulariser's term, as a pre-hook of the inner optimizer's step (on ZeRO-3 once per sub-group)."""
        assert self._regularizer is not None
        self._regularizer.add_to(_stepped(optimizer))

    def _begin_rates(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        """Remember where columns with rates of their own are, as a pre-hook of the inner optimizer's step."""
        assert self._rates is not None
        self._rates.begin(_stepped(optimizer))

    def _end_rates(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        """Apply the rates, as a post-hook of the inner optimizer that comes before `_reorthonormalize`."""
        assert self._rates is not None
        self._rates.end()

    def _reorthonormalize(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        """Make U and V orthonormal after the step that moves the last masters, as a post-hook of the inner optimizer.

        ZeRO-3 has copied the masters of the earlier sub-groups into the model by then, so these are copied again.
        Parameters that persist on all ranks are gathered by ZeRO-3 afterwards.
        """
        assert self._regularizer is not None
        self._inner_steps_taken += 1
        due = (self.global_steps + 1) % self._regularizer.regularizer.reorthonormalize == 0
        if due and self._inner_steps_taken == self._inner_steps:
            self._reorthonormalizer.apply()
            for sub_group in range(self._inner_steps - 1):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)


def _stepped(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The masters that the next step of the inner optimizer moves."""
    return [master for group in optimizer.param_groups for master in group["params"]]


def _import_muon() -> None:
    """Import DeepSpeed's Muon optimizer with its functions left uncompiled.

    DeepSpeed imports it for every engine, to ask whether the optimizer is one. Its functions are compiled as they are
    defined, and that would bring PyTorch's compiler: two seconds of a processor core for each rank that starts.
    """
    asked, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = asked


def _let_gradients_into_leaves(model: nn.Module) -> None:
    """Make the embeddings' output need a gradient where a module that ZeRO-3 gathers whole holds something trained.

    DeepSpeed reduces the gradients of such a leaf when the backward pass has come to the leaf's inputs. If none of
    these needs a gradient, as where only the experts of the first block are trained, it does so at once, before there
    are any.
    """
    leaves = [
        module for module in model.modules()
        if z3_leaf_module(module) or f"{type(module).__module__}.{type(module).__qualname__}" in
        DEFAULT_LEAF_MODULE_CLASSES
    ]  # fmt: skip
    enable = getattr(model, "enable_input_require_grads", None)
    if enable is not None and any(p.requires_grad for leaf in leaves for p in leaf.parameters()):
        enable()
