"""A LoRA for the untouched base model, in PEFT's format: what training changed, as one low-rank product per layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from re import escape
from statistics import mean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sorsa_ds.methods.peft_experts import as_parameters
from sorsa_ds.model.peft_names import PREFIX, WEIGHTS
from sorsa_ds.model.sharding import TensorSpec
from sorsa_ds.model.tensor_file import write_tensors
from sorsa_ds.run.merge import outside_linears
from sorsa_ds.run.peft_files.low_rank import low_rank_change
from sorsa_ds.run.peft_files.modules_to_save import ModulesToSave, modules_to_save
from sorsa_ds.run.peft_files.places import Place, find_places
from sorsa_ds.run.source import Source, TensorProgress
from sorsa_ds.runtime.files import write_json

if TYPE_CHECKING:
    from peft import LoraConfig

TRUNCATION = "truncation.json"
"""The file of the errors of a LoRA that was cut."""


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """The ranks of a LoRA.

    ranks: adapted weight, under each of its names -> rank of its part.
    truncated: whether any is smaller than the rank that would be exact.
    places: adapted weight, under each of its names -> where PEFT keeps its part.
    config: PEFT's configuration.
    saved: the modules that were trained whole.
    """

    ranks: dict[str, int]
    truncated: bool
    places: dict[str, Place]
    config: "LoraConfig"
    saved: ModulesToSave

    @property
    def rank(self) -> int:
        """The largest, which a server must provide for."""
        return max(self.ranks.values())

    @property
    def adapts_parameters(self) -> bool:
        """Whether PEFT adapts parameters, which hold experts, in place of modules."""
        return bool(self.config.target_parameters)

    @property
    def has_parameter_ranks(self) -> bool:
        """Whether parameters have ranks of their own."""
        patterns = self.config.rank_pattern or {}
        return any(f"^{escape(name)}" in patterns for name in self.config.target_parameters or [])


def plan_lora(source: Source, rank: int | None) -> LoraPlan:
    """The ranks that are exact (with SORSA twice the trained ones), none of them above `rank`.

    Raises:
        ValueError: a weight for which PEFT has no LoRA, or modules that were trained whole and that PEFT cannot save.
    """
    exact = {place: source.method.exact_rank(target) for target in source.targets for place in target.places}
    ranks = exact if rank is None else {name: min(r, rank) for name, r in exact.items()}
    saved, config = modules_to_save(source), _lora_config(source, ranks)
    places = find_places(source.model, config, source.targets, ranks)
    config.modules_to_save = saved.modules or None
    return LoraPlan(ranks, ranks != exact, places, config, saved)


def write_lora(
    source: Source,
    planned: LoraPlan,
    folder: Path,
    progress: TensorProgress,
    device: torch.device = torch.device("cpu"),  # noqa: B008 (never changed)
) -> dict[str, float]:
    """Fill a folder; returns each layer's relative error ||dW - B A||_F / ||dW||_F of what was cut off.

    Args:
        device: where the changes are decomposed.

    Raises:
        ValueError: the disk refuses.
    """
    specs = [spec for name, place in planned.places.items() for spec in place.specs(planned.ranks[name])]
    for name, one in planned.saved.parameters.items():
        specs.append(TensorSpec(PREFIX + name, source.model.get_parameter(one).shape, torch.float32))
    errors: dict[str, float] = {}

    def tensors() -> Iterator[Tensor]:
        targets = {target.name: target for target in source.targets}
        for name in progress(list(targets)):
            found = low_rank_change(source, targets[name], planned.ranks[name], device)
            errors[name] = found.error
            for place in targets[name].places:
                yield from planned.places[place].laid_out(found)
            del found
        for one in planned.saved.parameters.values():
            yield outside_linears(source, one).contiguous()

    write_tensors(folder / WEIGHTS, specs, tensors())
    planned.config.save_pretrained(str(folder))
    if planned.truncated:
        summary = {"rank": planned.rank, "worst": max(errors.values()), "mean": mean(errors.values())}
        write_json(folder / TRUNCATION, {**summary, "layers": errors})
    return errors


def _lora_config(source: Source, ranks: dict[str, int]) -> "LoraConfig":
    """PEFT's configuration of the LoRA.

    Every layer's alpha is its own rank: the scale is 1 also for servers that know no patterns, as older vLLM. PEFT
    takes the patterns' keys as regular expressions for the end of a name; these fit one name whole. The rank without a
    pattern is the largest, but for parameters: PEFT follows their patterns, and warns that it does not.
    """
    from peft import LoraConfig  # takes seconds, and most exports need no PEFT

    parameters = as_parameters(source.model, source.targets)
    modules = [target for target in source.targets if target not in parameters]
    weights = {target.name: target.weight for target in parameters}
    common = max(ranks[target.name] for target in parameters or modules)
    others = {f"^{escape(weights.get(name, name))}": rank for name, rank in ranks.items() if rank != common}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=source.base_name,
        revision=source.described.loading.revision,
        inference_mode=True,
        r=common,
        lora_alpha=common,
        rank_pattern=others,
        alpha_pattern=others,
        fan_in_fan_out=any(target.transposed for target in modules),
    )
    # PEFT would make sets of them, whose order changes from run to run.
    config.target_modules = [place for target in modules for place in target.places]
    config.target_parameters = list(weights.values()) or None
    return config
