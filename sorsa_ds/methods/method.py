"""What a way of fine-tuning says about itself: everything in which SORSA and its baselines differ.

No module outside of this room compares a method's name: it asks the `Method` that `registry.METHODS` has for it.
Importing a `Method` imports neither PEFT nor DeepSpeed, which take seconds: members import them where they need them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sorsa_ds.config.schema import AdapterConfig, BaselineConfig, RunConfig
from sorsa_ds.methods.given import Settings, TrainedRun
from sorsa_ds.model import fill
from sorsa_ds.model.adapter_file import INITIAL, TRAINED, FactorFile
from sorsa_ds.model.fill import Recipe
from sorsa_ds.model.init_report import LayerReport
from sorsa_ds.model.load import AdaptModel
from sorsa_ds.model.selection import Selection, choose
from sorsa_ds.model.targets import Target, counted
from sorsa_ds.model.whole_recipe import train_beside
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa.decompose import Factors
from sorsa_ds.sorsa.regularizer import Regularizer
from sorsa_ds.sorsa.residual_storage import Storage

if TYPE_CHECKING:
    from peft import LoraConfig

Values = Callable[[str, torch.Size], Tensor]
"""Gives a trained tensor, as training began or left it, by name and shape: fp32 on the CPU."""

SORSA_SETTINGS = ("sorsa.*", "regularizer.*", "residual.*")
"""Patterns of the settings that mean something to SORSA alone."""

EXPERT_SETTINGS = ("adapter.experts", "adapter.expert_rank")
"""Paths of the settings that mean something only to methods that adapt experts which a model holds as one parameter."""

ADAPTER_SETTINGS = ("adapter.rank", "adapter.rank_pattern", "adapter.alpha", "adapter.rslora", "adapter.dropout")
"""Paths of the settings that mean something only to methods that put an adapter beside a linear."""


@dataclass(frozen=True, slots=True)
class Making:
    """What a model is made with; the members are the arguments of `Method.operation`.

    device: where decompositions run; the meta device, where a model is only looked at.
    initial: the tensors with which training began; None where it has not begun, or began with the base model's own.
    """

    settings: Settings
    precision: Precision
    storage: Storage
    device: torch.device
    seed: int
    initial: FactorFile | None
    trained: Values | None


class Method(ABC):
    """A way of fine-tuning. It has no state: the settings of a run are arguments of its members."""

    name: str
    """The method's name in settings, tables and run folders, one of `config.method_settings.MethodName`."""

    title: str
    """The method's name in sentences and tables."""

    about: str = ""
    """A sentence on it for the model card, beginning with a space; may be empty."""

    plans_all_steps: bool = False
    """Whether what a step does to the model depends on how many there will be, beside the learning rate."""

    ignored_settings: Sequence[str] = (*SORSA_SETTINGS, *EXPERT_SETTINGS, "baseline.*")
    """Patterns of the settings that mean nothing to it. They are refused where they are not as by default."""

    variants: Mapping[str, Mapping[str, object]] = {}
    """Names under which a comparison runs it with settings changed: variant -> (path of a setting -> value)."""

    refused_stages: Mapping[int, str] = {}
    """ZeRO stages on which it cannot train -> the reason, as the second half of a sentence."""

    refused_exports: Mapping[str, str] = {"base": "it goes with SORSA's quantised residual"}
    """Formats of `launch/export.py` in which its runs cannot be written -> the reason, as half a sentence."""

    adapter_library: Literal["sorsa_ds", "peft"] = "peft"
    """What reads `--format adapter`: a copy of the run's own adapter, or an adapter in PEFT's format."""

    keeps_initial: bool = True
    """Whether a run keeps the trained tensors as it began with them. Whole weights are the base model's own."""

    has_rank: bool = True
    """Whether it puts an adapter of some rank beside a linear."""

    decomposes: bool = False
    """Whether loading a model decomposes most of its weights, so that the decompositions are what takes time."""

    refused_experts: str = "only SORSA and LoRA adapt experts that are held as one parameter"
    """Why it does not adapt experts that a model holds as one parameter, as half a sentence; empty: it adapts them."""

    refused_flat: str = ""
    """Why it does not adapt experts in a parameter of two dimensions, as in DBRX; empty: it adapts them as others."""

    layers_cast_weights: bool = False
    """Whether its layers cast their tensors themselves. torch.autocast keeps every copy until the forward pass ends."""

    suggests_rate: bool = False
    """Whether it has a rule for `train.learning_rate=auto`."""

    package: str | None = None
    """Module of an extra (`runtime.extras`) that its runs need; None: they need none."""

    @property
    def adapter_files(self) -> tuple[str, ...]:
        """Names of the files of tensors in a run's adapter."""
        return (INITIAL, TRAINED) if self.keeps_initial else (TRAINED,)

    def choose(self, model: nn.Module, adapter: AdapterConfig) -> Selection:
        """The linears that it adapts, in module order; none where every parameter is trained.

        Raises:
            ValueError: `model.selection.choose` finds bad targets or ranks.
        """
        return choose(model, adapter, self.refused_experts, self.refused_flat)

    def trained_linears(self, model: nn.Module, adapter: AdapterConfig) -> list[Target]:
        """All linears whose weight training changes, in module order, the output head left out.

        Raises:
            ValueError: `model.selection.choose` finds bad targets or ranks.
        """
        return self.choose(model, adapter).targets

    def operation(
        self,
        settings: Settings,
        precision: Precision,
        storage: Storage,
        device: torch.device,
        *,
        seed: int = 0,
        initial: Path | None = None,
        trained: Values | None = None,
    ) -> AdaptModel:
        """What the method makes of a model without memory: its layers, what is trained, and how every tensor is filled.

        Args:
            storage: how SORSA's residual is kept.
            device: where decompositions run; the meta device, where a model is only looked at.
            seed: seeds what is drawn at the start.
            initial: the file of the tensors with which training began, where it has begun.
            trained: gives the tensors as training has left them.
        """
        begun = FactorFile(initial) if initial is not None and self.keeps_initial else None
        making = Making(settings, precision, storage, device, seed, begun, trained)

        def operate(model: PreTrainedModel) -> tuple[Selection, Recipe]:
            selection, recipe = self.adapt(model, making)
            if selection.whole:
                recipe = train_beside(model, recipe, selection.whole, precision, trained)
            return selection, recipe

        return operate

    @abstractmethod
    def adapt(self, model: PreTrainedModel, making: Making) -> tuple[Selection, Recipe]:
        """Change a model without memory as `operation` says.

        Returns:
            The targets, in module order, with what is left out, and what fills every tensor.

        Raises:
            ValueError: bad targets or ranks, or a linear that the method cannot adapt.
        """

    def working_set(self, settings: Settings, targets: Sequence[Target], largest: int, storage: Storage) -> int:
        """Bytes that a rank holds at most besides its final shards while its part of the model is made.

        Args:
            largest: numbers of the largest parameter.
        """
        return fill.reading_bytes(largest)

    def engine(self, config: RunConfig, steps: int) -> Callable:
        """What makes the engine; it is called as `SorsaEngine` is.

        Args:
            steps: optimizer steps of the run.

        Raises:
            ValueError: the settings do not go with that many steps.
        """
        from sorsa_ds.engine.engine import SorsaEngine  # imports DeepSpeed

        return SorsaEngine

    def check_decomposed(self, settings: Settings, reports: Sequence[LayerReport]) -> None:
        """Stop where the settings need something of the weights that these do not have.

        Args:
            reports: how the layers were decomposed.

        Raises:
            ValueError: naming the first such layer.
        """
        return

    def suggested_rate(self, settings: Settings, reports: Sequence[LayerReport]) -> float:
        """The learning rate for which `auto` stands. Asked only where `suggests_rate` says that there is one.

        Args:
            reports: how the layers were decomposed.

        Raises:
            ValueError: no rate follows from them.
        """
        raise NotImplementedError(f"{self.name} has no rule for the learning rate")

    def regularizer(self, config: RunConfig) -> Regularizer | None:
        """The orthonormal regulariser of a run with these settings; None where the method has none.

        Where `train.gradient_accumulation_steps` is still open, 1 is taken.
        """
        return None

    def rank(self, target: Target, baseline: BaselineConfig) -> int:
        """The rank with which a target's adapter begins."""
        return target.rank

    def rows(
        self, config: RunConfig, targets: Sequence[Target], trained: int, reg: Regularizer | None
    ) -> list[tuple[str, str]]:
        """Rows of the table at the beginning of a run: (heading, text).

        Args:
            trained: the number of trained parameters.
            reg: what `regularizer` gave.
        """
        where = counted(targets) or "every parameter"
        return [("method", self.name), ("trained", f"{where}, {trained:,} parameters")]

    def summary(self, settings: Settings, precision: Precision) -> str:
        """A few words for the table of a plan."""
        return f"method {self.name}"

    def residual_names(self, target: Target, storage: Storage) -> list[str]:
        """Names of the parameters in which a target's W_r is kept; none where the frozen weight is kept as it is."""
        return []

    def layer_scratch_bytes(self, targets: Sequence[Target]) -> int:
        """Bytes of the matrices that its largest layer makes for one product, and that autograd does not keep."""
        return 0

    def step_copies_bytes(self, targets: Sequence[Target], compute: torch.dtype, held: torch.dtype) -> int:
        """Bytes of trained tensors, held in one dtype, that layers keep in another from a step's first pass on."""
        return 0

    def step_scratch_bytes(self, config: RunConfig, ranks: Iterable[int], trainable: int) -> int:
        """Bytes on the GPU that an optimizer step takes for the method's own terms, such as a regulariser.

        Args:
            ranks: the rank of every linear's adapter; 0 where it has none.
            trainable: the number of trained parameters.
        """
        return 0

    def moment_numbers(self, config: RunConfig, targets: Sequence[Target], trainable: int) -> int:
        """Numbers of AdamW's two moments of everything that is trained, and of what the optimizer keeps beside them."""
        return 2 * trainable

    def step_traffic(self, config: RunConfig, targets: Sequence[Target], zero_stage: int) -> dict[str, float]:
        """Bytes of an optimizer step that the method's own terms send, by purpose.

        They are counted as an all-gather or a reduce-scatter with the same effect, over all ranks (`plan.traffic`).
        """
        return {}

    def trained_under(self, model: nn.Module, targets: Sequence[Target]) -> dict[str, str]:
        """Each target's name -> how the names of the tensors that are trained in it begin.

        Args:
            model: with or without the method's layers; it needs no memory.
        """
        return {target.name: f"{target.name}." for target in targets}

    def changed_parameters(self, targets: Sequence[Target], trained: FactorFile) -> dict[str, Target | None]:
        """The base model's parameters that training has changed -> the linear whose weight it is, or None."""
        return {target.weight: target for target in targets}

    @abstractmethod
    def merged_weight(self, run: TrainedRun, name: str, target: Target | None, untrained: bool = False) -> Tensor:
        """A changed parameter as training computed with it, in fp32: (M, N) where it is a target's weight, or (E, M, N)
        where that is one of experts.

        Args:
            name: the parameter's, one of `changed_parameters`, and `target` what that has for it.
            untrained: return the weight before training. Only SORSA's differs from the base model's, so only SORSA is
                asked.

        Raises:
            ValueError: a file is damaged, or the base model is not the one that was trained on.
        """

    def plain_layer(self, layer: nn.Module, trained_in: Precision, dtype: torch.dtype) -> nn.Module | Tensor | None:
        """The plain linear in `dtype` that one of its layers stands for, or the weights (E, M, N) where that is of
        experts; None where the layer is not one to be merged.

        Args:
            trained_in: the precision in which it was trained: factors are rounded as they were then.
        """
        return None

    def factors(self, file: FactorFile, target: Target) -> Factors | None:
        """A target's U (M, R), s (R,) and V (N, R) in fp32 on the CPU; None where other things are trained.

        Raises:
            ValueError: the file lacks one of them, or has it in another shape.
        """
        return None

    def exact_rank(self, target: Target) -> int:
        """The rank of the LoRA that holds a target's change exactly. Asked only where `lora` is not refused."""
        return min(target.rank, target.out_features, target.in_features)

    def change_product(self, run: TrainedRun, target: Target) -> tuple[Tensor, Tensor]:
        """(left (M, K), right (N, K)) in float64 with dW = left right^T, with E before both where the target is of
        experts. Asked only where `lora` is not refused.

        Raises:
            ValueError: a file lacks what was trained.
        """
        raise NotImplementedError(f"{self.name} refuses the format lora")

    def peft_config(
        self, settings: Settings, targets: Sequence[Target], parameters: Collection[Target] = ()
    ) -> LoraConfig:
        """PEFT's configuration of the whole adapted model. Asked only where `adapter` is in PEFT's format.

        Args:
            parameters: the targets that PEFT must adapt as parameters; they stay linears where it cannot.
        """
        raise NotImplementedError(f"{self.name} has no adapter in PEFT's format")
