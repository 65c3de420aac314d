"""AdaLoRA's steps: its orthogonal term in the loss, and its ranks taken away after each step, both computed by PEFT.

PEFT works on a model whose parameters and gradients are whole. Under ZeRO the fp32 masters and their gradients lie in
fragments over the ranks. After each step they are summed into whole ones: 8 bytes per trained number are communicated,
and the factors are small. Every rank shows the whole ones to PEFT's allocator alike, and what it masks goes back into
masters and model.
"""

from types import SimpleNamespace
from typing import cast

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraModel, RankAllocator
from torch import Tensor, nn

from sorsa_ds.config.schema import RunConfig
from sorsa_ds.engine.engine import SorsaEngine, StepReport
from sorsa_ds.engine.masters import inner_optimizer
from sorsa_ds.methods.families.adalora import first_and_last_rank
from sorsa_ds.model.peft_names import ONLY_ADAPTER
from sorsa_ds.runtime.collectives import sum_over_ranks

_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")


def schedule(config: RunConfig, steps: int) -> AdaLoraConfig:
    """PEFT's configuration of the rank budget and of the orthogonal term, for a run of so many steps.

    Raises:
        ValueError: the target rank is above the one at the start, or no step is left in which ranks are taken away.
    """
    baseline = config.baseline
    begin, end = first_and_last_rank(config)
    t_init = steps // 10 if baseline.adalora_t_init is None else baseline.adalora_t_init
    t_final = steps // 2 if baseline.adalora_t_final is None else baseline.adalora_t_final
    if end > begin:
        raise ValueError(f"baseline.adalora_target_rank is {end}, above the {begin} with which the linears begin")
    if begin == end:
        t_init = t_final = 0  # nothing is taken away: every schedule is the same
    if t_init + t_final >= steps:
        raise ValueError(
            f"baseline.adalora_t_init ({t_init}) and adalora_t_final ({t_final}) leave none of {steps} steps in which "
            f"ranks could be taken away"
        )
    return AdaLoraConfig(
        init_r=begin, target_r=end, tinit=t_init, tfinal=t_final, deltaT=baseline.adalora_delta_t, total_step=steps,
        beta1=baseline.adalora_beta1, beta2=baseline.adalora_beta2, orth_reg_weight=baseline.adalora_orthogonal_weight,
    )  # fmt: skip


class AdaLoraEngine(SorsaEngine):
    """A SorsaEngine for PEFT's AdaLoRA layers, on ZeRO stages 0 to 2.

    Args:
        config: PEFT's configuration of the rank budget and of the orthogonal term, from `schedule`. Where its ranks at
            the start and at the end are equal, as in the SORSA papers' runs, there is nothing to allocate (PEFT's
            allocator would fail), and the orthogonal term is all.
    """

    def __init__(self, *args, config: AdaLoraConfig):
        super().__init__(*args)
        self._allocates = config.init_r > config.target_r
        device = self.device if self._allocates else torch.device("meta")  # else their names are all that is needed
        self._whole = {
            name: nn.Parameter(torch.zeros(shape, device=device)) for name, shape in self.trained_shapes.items()
        }
        shown = SimpleNamespace(named_parameters=self._whole.items)
        self._allocator = RankAllocator(shown, config, ONLY_ADAPTER)
        self._tuner = SimpleNamespace(
            peft_config={ONLY_ADAPTER: config},
            trainable_adapter_name=ONLY_ADAPTER,
            rankallocator=self._allocator,
            model=shown,
        )
        self._settings = config
        if self._allocates:
            inner_optimizer(self).register_step_pre_hook(self._keep_gradients)

    def train_step(self, losses, passes: int | None = None, summed: Tensor | None = None) -> StepReport:
        """One optimizer step with PEFT's orthogonal term in every micro-batch's loss: one backward pass has both."""
        return super().train_step((loss + self.orthogonal_term() for loss in losses), passes, summed)

    def orthogonal_term(self) -> Tensor:
        """orth_reg_weight times the mean of ||A A^T - I||_F and ||B^T B - I||_F over all matrices, as PEFT takes it."""
        output = SimpleNamespace(loss=torch.zeros((), device=self.device))
        model = SimpleNamespace(forward=lambda: output, named_parameters=self.module.named_parameters)
        shown = SimpleNamespace(**{**vars(self._tuner), "model": model})
        return AdaLoraModel.forward(cast(AdaLoraModel, shown)).loss

    @property
    def ranks(self) -> dict[str, int]:
        """Singular values of each linear that are not taken away, by the name of its lora_E; empty before the first."""
        return {name: sum(mask) for name, mask in (self._settings.rank_pattern or {}).items()}

    def method_state(self) -> dict[str, Tensor]:
        """The allocator's averages and the ranks that are left; every rank has them alike."""
        state = {
            f"{kind}/{name}": tensor for kind in _AVERAGES for name, tensor in getattr(self._allocator, kind).items()
        }
        masks = (self._settings.rank_pattern or {}).items()
        return state | {f"mask/{name}": torch.tensor(mask, dtype=torch.uint8) for name, mask in masks}

    def restore_method_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `method_state` gave, so that training goes on from there."""
        for key, tensor in state.items():
            kind, _, name = key.partition("/")
            if kind == "mask":
                self._settings.rank_pattern = {**(self._settings.rank_pattern or {}), name: tensor.bool().tolist()}
            else:
                getattr(self._allocator, kind)[name] = tensor.to(self.device)
                self._allocator.ipt[name] = torch.zeros_like(tensor, device=self.device)  # made anew in each step

    def _take_model_step(self, lr_kwargs) -> None:
        super()._take_model_step(lr_kwargs)
        if self._allocates:
            self._allocate()

    @torch.no_grad()
    def _keep_gradients(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        """Keep the gradients before the optimizer's step, when they are averaged and clipped, as in PEFT's loops."""
        gradients = {name: torch.zeros_like(parameter) for name, parameter in self._whole.items()}
        for name, parameter in self._whole.items():
            parameter.grad = gradients[name]
        for fragment in self.masters.fragments:
            whole = gradients[fragment.name].view(-1)
            whole[fragment.start : fragment.start + fragment.numel] = fragment.gradient().to(self.device)

    @torch.no_grad()
    def _allocate(self) -> None:
        """Let PEFT mask singular values after a step.

        Fragments of values and gradients are summed into whole tensors, PEFT weighs and masks these, and what it has
        masked is written back into masters and model.
        """
        for parameter in self._whole.values():
            parameter.zero_()
        for fragment in self.masters.fragments:
            whole = self._whole[fragment.name].view(-1)
            whole[fragment.start : fragment.start + fragment.numel] = fragment.values().to(self.device)
        if self.masters.sharded:
            sum_over_ranks([tensor for p in self._whole.values() for tensor in (p.data, p.grad) if tensor is not None])
        AdaLoraModel.update_and_allocate(cast(AdaLoraModel, self._tuner), self.global_steps)
        for fragment in self.masters.fragments:
            if "lora_E" in fragment.name:
                whole = self._whole[fragment.name].view(-1)
                fragment.values().copy_(whole[fragment.start : fragment.start + fragment.numel])
        for name, parameter in self.module.named_parameters():
            if "lora_E" in name:
                parameter.copy_(self._whole[name])
