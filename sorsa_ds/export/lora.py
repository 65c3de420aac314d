"""A LoRA for the untouched base model, in PEFT's format: what training changed, as one low-rank product per layer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from re import escape
from statistics import mean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sorsa_ds.export.low_rank import low_rank_change
from sorsa_ds.export.modules_to_save import ModulesToSave, modules_to_save
from sorsa_ds.export.tensor_file import write_tensors
from sorsa_ds.model.adapter_file import TRAINED
from sorsa_ds.model.sharding import TensorSpec
from sorsa_ds.run.merge import outside_linears
from sorsa_ds.run.source import Source, TensorProgress
from sorsa_ds.runtime.files import write_json

if TYPE_CHECKING:
    from peft import LoraConfig

OUTSIDE = "base_model.model."
"""What PEFT puts before the name of a parameter."""

TRUNCATION = "truncation.json"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank takes (MaxLoRARanks in vllm/config/lora.py)."""


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """The ranks of a LoRA.

    ranks: adapted linear, under each of its names -> rank of its part.
    truncated: whether any is smaller than the rank that would be exact.
    saved: the modules that were trained whole.
    """

    ranks: dict[str, int]
    truncated: bool
    saved: ModulesToSave

    @property
    def rank(self) -> int:
        """The largest, which a server must provide for."""
        return max(self.ranks.values())


def plan_lora(source: Source, rank: int | None) -> LoraPlan:
    """The ranks that are exact (with SORSA twice the trained ones), none of them above `rank`.

    Raises:
        ValueError: a rank below 1, or modules that were trained whole and that PEFT cannot save.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"--rank {rank}: a LoRA has at least rank 1")
    exact = {place: source.method.exact_rank(target) for target in source.targets for place in target.places}
    ranks = exact if rank is None else {name: min(r, rank) for name, r in exact.items()}
    return LoraPlan(ranks, truncated=ranks != exact, saved=modules_to_save(source, "lora"))


def write_lora(source: Source, planned: LoraPlan, folder: Path, progress: TensorProgress) -> dict[str, float]:
    """Fill a folder; returns each layer's relative error ||dW - B A||_F / ||dW||_F of what was cut off.

    Raises:
        ValueError: the disk refuses.
    """
    specs = []
    for target in source.targets:
        rank = planned.ranks[target.name]
        for place in target.places:
            for leaf, shape in (("A", (rank, target.in_features)), ("B", (target.out_features, rank))):
                name = f"{OUTSIDE}{place}.lora_{leaf}.weight"
                specs.append(TensorSpec(name, torch.Size(shape), torch.float32))
    for name, one in planned.saved.parameters.items():
        specs.append(TensorSpec(OUTSIDE + name, source.model.get_parameter(one).shape, torch.float32))
    errors: dict[str, float] = {}

    def tensors() -> Iterator[Tensor]:
        targets = {target.name: target for target in source.targets}
        for name in progress(list(targets)):
            found = low_rank_change(source, targets[name], planned.ranks[name])
            errors[name] = found.error
            for _ in targets[name].places:
                yield found.A
                yield found.B
            del found
        for one in planned.saved.parameters.values():
            yield outside_linears(source, one).contiguous()

    write_tensors(folder / TRAINED, specs, tensors())
    _lora_config(source, planned).save_pretrained(str(folder))
    if planned.truncated:
        summary = {"rank": planned.rank, "worst": max(errors.values()), "mean": mean(errors.values())}
        write_json(folder / TRUNCATION, {**summary, "layers": errors})
    return errors


def _lora_config(source: Source, planned: LoraPlan) -> "LoraConfig":
    """PEFT's configuration of the LoRA.

    Every layer's alpha is its own rank: the scale is 1 also for servers that know no patterns, as older vLLM. PEFT
    takes the patterns' keys as regular expressions for the end of a name; these fit one name whole.
    """
    from peft import LoraConfig  # takes seconds, and most exports need no PEFT

    others = {f"^{escape(name)}": rank for name, rank in planned.ranks.items() if rank != planned.rank}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=source.base_name,
        revision=source.described.loading.revision,
        inference_mode=True,
        r=planned.rank,
        lora_alpha=planned.rank,
        rank_pattern=others,
        alpha_pattern=others,
        fan_in_fan_out=any(target.transposed for target in source.targets),
    )
    config.modules_to_save = planned.saved.modules or None
    config.target_modules = list(planned.ranks)  # PEFT would make a set of it, whose order changes from run to run
    return config


def served_by_vllm(rank: int, saved: Sequence[str] = ()) -> str:
    """A line on vLLM, which takes only some ranks, and no modules that were trained whole (`saved`)."""
    if saved:
        return f"vLLM takes no adapter with modules_to_save ({', '.join(saved[:3])}): serve --format merged"
    fitting = next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
    if fitting is None:
        return f"vLLM takes LoRA ranks up to {VLLM_RANKS[-1]}, this one has {rank}: cut it with --rank {VLLM_RANKS[-1]}"
    return f"vLLM serves it with --enable-lora --max-lora-rank {fitting} (its default is 16)"
