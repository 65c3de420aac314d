"""Full fine-tuning, and partial fine-tuning of the whole weights of some linears. No layer is replaced."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sorsa_ds.config.schema import AdapterConfig
from sorsa_ds.methods.method import ADAPTER_SETTINGS, Making, Method, TrainedRun
from sorsa_ds.model.adapter_file import FactorFile
from sorsa_ds.model.fill import Recipe
from sorsa_ds.model.selection import Selection, body_of, select_targets
from sorsa_ds.model.targets import Target
from sorsa_ds.model.whole_recipe import WeightsRecipe, whole_value


class WholeWeights(Method):
    """Fine-tuning without adapters."""

    refused_exports: Mapping[str, str] = dict.fromkeys(
        ("lora", "base", "adapter"), "whole weights were trained, which no adapter holds"
    )
    keeps_initial = False
    has_rank = False

    def adapt(self, model: PreTrainedModel, making: Making) -> tuple[Selection, Recipe]:
        selection = self.choose(model, making.settings.adapter)
        model.requires_grad_(False)
        self.train_parameters(model, selection.targets)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(making.precision.factor_dtype)
        return selection, WeightsRecipe.of(model, making.precision, making.trained)

    @abstractmethod
    def train_parameters(self, model: PreTrainedModel, targets: Sequence[Target]) -> None:
        """Mark what is trained of a frozen model without memory."""

    def merged_weight(self, run: TrainedRun, name: str, target: Target | None, untrained: bool = False) -> Tensor:
        weight = whole_value(run.trained, name, run.precision)
        return weight.t() if target is not None and target.transposed else weight


class Full(WholeWeights):
    """Full fine-tuning: every parameter is trained, and there are no targets."""

    name, title = "full", "full fine-tuning"
    ignored_settings = (
        *Method.ignored_settings,
        "adapter.targets",
        "adapter.layers",
        "adapter.train_whole",
        *ADAPTER_SETTINGS,
    )

    def choose(self, model: nn.Module, adapter: AdapterConfig) -> Selection:
        return Selection([], {}, body_of(model), 0)

    def trained_linears(self, model: nn.Module, adapter: AdapterConfig) -> list[Target]:
        return select_targets(model, AdapterConfig(rank=1))

    def train_parameters(self, model: PreTrainedModel, targets: Sequence[Target]) -> None:
        model.requires_grad_(True)

    def changed_parameters(self, targets: Sequence[Target], trained: FactorFile) -> dict[str, Target | None]:
        return dict.fromkeys(trained.names)


class Partial(WholeWeights):
    """Partial fine-tuning: the whole weights of the targets are trained."""

    name, title = "partial", "partial fine-tuning"
    ignored_settings = (*Method.ignored_settings, *ADAPTER_SETTINGS)

    def train_parameters(self, model: PreTrainedModel, targets: Sequence[Target]) -> None:
        for target in targets:
            linear = cast(nn.Linear | Conv1D, model.get_submodule(target.name))
            weight = nn.Parameter(linear.weight.detach())  # apart from an embedding that it is tied with
            for place in target.places:
                cast(nn.Linear | Conv1D, model.get_submodule(place)).weight = weight
