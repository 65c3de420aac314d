"""A LoRA for the untouched base model, in PEFT's format: what training changed, as one low-rank product a layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from re import escape
from statistics import mean

import torch
from torch import Tensor

from sorsa_ds.export.low_rank import change, exact_rank
from sorsa_ds.export.tensor_file import write_tensors
from sorsa_ds.model.adapter_file import CONFIG, TRAINED
from sorsa_ds.model.sharding import TensorSpec
from sorsa_ds.run.source import Progress, Source
from sorsa_ds.runtime.files import write_json

TRUNCATION = "truncation.json"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank takes (MaxLoRARanks in vllm/config/lora.py)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """ranks: adapted linear -> rank of its LoRA. truncated: whether any is smaller than what is exact."""

    ranks: dict[str, int]
    truncated: bool

    @property
    def rank(self) -> int:
        """The largest, which a server must provide for."""
        return max(self.ranks.values())


def plan(source: Source, rank: int | None) -> Plan:
    """The ranks: those that are exact (with SORSA twice the trained ones), or at most `rank`.

    Raises:
        ValueError: a rank below 1.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"--rank {rank}: a LoRA has at least rank 1")
    exact = {target.name: exact_rank(source, target) for target in source.targets}
    ranks = exact if rank is None else {name: min(r, rank) for name, r in exact.items()}
    return Plan(ranks, truncated=ranks != exact)


def write(source: Source, planned: Plan, folder: Path, progress: Progress) -> dict[str, float]:
    """Fill a folder; returns each layer's relative error ||dW - B A||_F / ||dW||_F of what was cut off.

    Raises:
        ValueError: the disk refuses.
    """
    specs = []
    for target in source.targets:
        rank = planned.ranks[target.name]
        for leaf, shape in (("A", (rank, target.in_features)), ("B", (target.out_features, rank))):
            name = f"base_model.model.{target.name}.lora_{leaf}.weight"
            specs.append(TensorSpec(name, torch.Size(shape), torch.float32))
    errors: dict[str, float] = {}

    def tensors() -> Iterator[Tensor]:
        targets = {target.name: target for target in source.targets}
        for name in progress(list(targets)):
            found = change(source, targets[name], planned.ranks[name])
            errors[name] = found.error
            yield found.A
            yield found.B
            del found

    write_tensors(folder / TRAINED, specs, tensors())
    write_json(folder / CONFIG, peft_config(source, planned))
    if planned.truncated:
        summary = {"rank": planned.rank, "worst": max(errors.values()), "mean": mean(errors.values())}
        write_json(folder / TRUNCATION, {**summary, "layers": errors})
    return errors


def peft_config(source: Source, planned: Plan) -> dict:
    """adapter_config.json as PEFT reads it.

    Every layer's alpha is its own rank: the scale is 1 also for servers that know no patterns, as older vLLM. PEFT
    takes the patterns' keys as regular expressions for the end of a name; these fit one name whole.
    """
    others = {f"^{escape(name)}": rank for name, rank in planned.ranks.items() if rank != planned.rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.described.base_model if source.from_hub else str(source.base),
        "revision": source.described.loading.revision,
        "inference_mode": True,
        "r": planned.rank,
        "lora_alpha": planned.rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(planned.ranks),
        "fan_in_fan_out": any(target.transposed for target in source.targets),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def served_by_vllm(rank: int) -> str:
    """A line on vLLM, which takes only some ranks."""
    fitting = next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
    if fitting is None:
        return f"vLLM takes LoRA ranks up to {VLLM_RANKS[-1]}, this one has {rank}: cut it with --rank {VLLM_RANKS[-1]}"
    return f"vLLM serves it with --enable-lora --max-lora-rank {fitting} (its default is 16)"
