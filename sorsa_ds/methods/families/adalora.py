"""AdaLoRA: what it is to this program. Its steps are those of `methods.adalora_engine`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from sorsa_ds.config.schema import BaselineConfig, RunConfig
from sorsa_ds.methods.families.peft_adapters import Dora, PeftMethod
from sorsa_ds.methods.method import EXPERT_SETTINGS, SORSA_SETTINGS
from sorsa_ds.model.targets import Target

if TYPE_CHECKING:
    from peft import LoraConfig


class AdaLora(PeftMethod):
    """AdaLoRA: P diag(e) Q beside a linear with an orthogonal term in the loss, and ranks taken away on the way."""

    name, title = "adalora", "AdaLoRA"
    ignored_settings = (
        *SORSA_SETTINGS, *EXPERT_SETTINGS, "baseline.pissa_*", "baseline.loraplus_*", "baseline.galore_*",
        "adapter.rank_pattern", "adapter.rslora",
    )  # fmt: skip
    matrices = 3
    plans_all_steps = True
    refused_stages: Mapping[int, str] = {
        3: "PEFT takes its orthogonal term on factors that it gathers after the forward pass, and ZeRO-3 has cut them "
           "again when the backward pass comes to that term",
    }  # fmt: skip
    refused_exports: Mapping[str, str] = Dora.refused_exports

    def layer_config(self, rank: int, baseline: BaselineConfig, initialise: bool, shared: dict[str, Any]) -> LoraConfig:
        from peft import AdaLoraConfig

        return AdaLoraConfig(init_r=rank, target_r=rank, total_step=1, **shared)  # the engine has the schedule

    def engine(self, config: RunConfig, steps: int) -> Callable:
        from sorsa_ds.methods.adalora_engine import AdaLoraEngine, schedule  # imports DeepSpeed and PEFT

        return partial(AdaLoraEngine, config=schedule(config, steps))

    def rank(self, target: Target, baseline: BaselineConfig) -> int:
        return baseline.adalora_init_rank or target.rank

    def step_scratch_bytes(self, config: RunConfig, ranks: Iterable[int], trainable: int) -> int:
        """fp32 Gram matrices, unit matrices and their differences.

        Where ranks are taken away, also whole values, gradients and averages of the importance (`AdaLoraEngine`).
        """
        begin, end = first_and_last_rank(config)
        numbers = 3 * sum(2 * rank**2 for rank in ranks)
        return 4 * (numbers + (5 * trainable if begin > end else 0))


def first_and_last_rank(config: RunConfig) -> tuple[int, int]:
    """The rank with which every linear begins, and the mean rank that is left at the end."""
    baseline = config.baseline
    return baseline.adalora_init_rank or config.adapter.rank, baseline.adalora_target_rank or config.adapter.rank
