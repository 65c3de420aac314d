"""LoRA, PiSSA, DoRA and OLoRA: what they are to this program. Their layers are PEFT's own (`methods.peft_layers`)."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from re import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sorsa_ds.config.schema import BaselineConfig, RunConfig
from sorsa_ds.methods.method import EXPERT_SETTINGS, SORSA_SETTINGS, Making, Method, Settings, TrainedRun
from sorsa_ds.methods.peft_experts import apart, holder_of, is_turned, layer_names
from sorsa_ds.model.fill import Recipe, reading_bytes
from sorsa_ds.model.peft_names import ONLY_ADAPTER
from sorsa_ds.model.selection import Selection
from sorsa_ds.model.targets import Target
from sorsa_ds.runtime.numerics import full_fp32_products
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa.regularizer import Regularizer
from sorsa_ds.sorsa.residual_storage import Storage

if TYPE_CHECKING:
    from peft import LoraConfig

    from sorsa_ds.methods.peft_layers import PeftLayers

NO_BASE_EXPORT = Method.refused_exports


class PeftMethod(Method):
    """A method whose layers PEFT has. PEFT is imported only where a layer is made or its configuration is asked for."""

    matrices: int
    """fp32 matrices of a layer's size that its owner holds while PEFT makes it: the weight, the copy that PEFT changes,
    and a message to the other ranks, which make three; and what the method's start takes."""

    changes_frozen_weight: bool = False
    """Whether its first product is taken off the frozen weight, which is W - scale * B_0 A_0 then."""

    adapts_conv1d: bool = True
    """Whether PEFT puts its layer around a Conv1D too, as GPT-2 has."""

    refused_flat = "PEFT takes experts in a parameter of two dimensions for one matrix"

    @abstractmethod
    def layer_config(self, rank: int, baseline: BaselineConfig, initialise: bool, shared: dict[str, Any]) -> LoraConfig:
        """PEFT's configuration of linears of one rank.

        Args:
            initialise: False where nothing is to be decomposed.
            shared: arguments that all methods have alike.
        """

    def lapack_numbers(self, m: int, n: int, baseline: BaselineConfig) -> int:
        """fp32 numbers that LAPACK takes beside the matrices while a layer (m, n) is made."""
        return 0

    def adapt(self, model: PreTrainedModel, making: Making) -> tuple[Selection, Recipe]:
        from sorsa_ds.methods.peft_layers import PeftRecipe

        layers = self.layers(making.settings, making.seed)
        names = layer_names(model)
        selection = layers.operate(model, making.precision)
        initial = None if making.initial is None else making.initial.values
        return selection, PeftRecipe(layers, model, making.precision, making.device, names, initial, making.trained)

    def layers(self, settings: Settings, seed: int = 0) -> PeftLayers:
        """What makes PEFT's layers with these settings."""
        from sorsa_ds.methods.peft_layers import PeftLayers

        return PeftLayers(self, settings.adapter, settings.baseline, seed)

    def working_set(self, settings: Settings, targets: Sequence[Target], largest: int, storage: Storage) -> int:
        return reading_bytes(largest, max(self._layer_bytes(target, settings.baseline) for target in targets))

    def _layer_bytes(self, target: Target, baseline: BaselineConfig) -> int:
        """Bytes of a target's layer while its owner makes it."""
        m, n = target.out_features, target.in_features
        numbers = self.matrices * m * n + self.lapack_numbers(m, n, baseline)
        return 4 * target.matrices * (numbers + 2 * self.rank(target, baseline) * (m + n + 1))

    def rows(
        self, config: RunConfig, targets: Sequence[Target], trained: int, reg: Regularizer | None
    ) -> list[tuple[str, str]]:
        ours = sum(target.trainable for target in targets)
        compared = f"SORSA at this rank trains r (m + n + 1): {ours:,}, {_more(ours - trained)}"
        ratio = config.baseline.loraplus_lr_ratio
        faster = [("LoRA+", f"B and vectors learn with {ratio:g} x the learning rate")] if ratio is not None else []
        return [*super().rows(config, targets, trained, reg), *faster, ("for comparison", compared)]

    def trained_under(self, model: nn.Module, targets: Sequence[Target]) -> dict[str, str]:
        layers = layer_names(model)
        return {target.name: f"{layers.get(target.name, target.name)}.lora_" for target in targets}

    def merged_weight(self, run: TrainedRun, name: str, target: Target | None, untrained: bool = False) -> Tensor:
        """Merged by PEFT, over the frozen weight as it was rounded in training."""
        from sorsa_ds.methods.peft_layers import frozen_weight, merged_matrices, set_trained

        assert target is not None
        formats = run.precision

        def as_held(name: str, shape: torch.Size) -> Tensor:
            return run.trained.values(name, shape).to(formats.factor_dtype).float()

        initial = None if run.initial is None else run.initial.values
        weight = run.weights.weight(target).float()
        layer = self.layers(run.described).layer(target, weight, None, initial, holder_of(run.model, target))
        frozen = frozen_weight(layer)
        frozen.data = frozen.data.to(formats.residual_dtype).float()
        set_trained(layer, layer_names(run.model).get(target.name, target.name), as_held)
        return merged_matrices(layer, target)

    def plain_layer(self, layer: nn.Module, trained_in: Precision, dtype: torch.dtype) -> nn.Module | Tensor | None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        from sorsa_ds.methods.peft_layers import plain_module

        if not isinstance(layer, BaseTunerLayer) or layer.merged:  # that of another parameter of the same experts was
            return None
        with full_fp32_products():
            return plain_module(layer).to(dtype)

    def exact_rank(self, target: Target) -> int:
        rank = 2 * target.rank if self.changes_frozen_weight else target.rank
        return min(rank, target.out_features, target.in_features)

    def change_product(self, run: TrainedRun, target: Target) -> tuple[Tensor, Tensor]:
        """dW = scale * B A; where B_0 A_0 was taken off the frozen weight, dW = scale * (B A - B_0 A_0)."""
        files = [run.trained]
        if self.changes_frozen_weight:
            assert run.initial is not None
            files.append(run.initial)
        layer = layer_names(run.model).get(target.name, target.name)
        products = []
        for file in files:
            A, B = (file.tensor(f"{layer}.lora_{leaf}.{ONLY_ADAPTER}.weight").double() for leaf in "AB")
            products.append(apart(A, B, target))
        if is_turned(holder_of(run.model, target), target):
            products = [(B.mT, A.mT) for A, B in products]
        left = torch.cat([B if number == 0 else -B for number, (_, B) in enumerate(products)], -1)
        return run.described.adapter.scale(target.rank) * left, torch.cat([A.mT for A, _ in products], -1)

    def peft_config(
        self, settings: Settings, targets: Sequence[Target], parameters: Collection[Target] = ()
    ) -> LoraConfig:
        """PEFT's configuration. It names the most common rank; other ranks stand in `rank_pattern`."""
        if self.refused_experts:
            parameters = ()
        names = {place: target for target in targets for place in target.places}
        ranks = {place: self.rank(target, settings.baseline) for place, target in names.items()}
        # That of parameters, where there are some: PEFT follows patterns for them, and warns that it does not.
        [(rank, _)] = Counter(ranks[target.name] for target in parameters or targets).most_common(1)
        config = self.layers(settings).config(
            rank, [place for place, target in names.items() if target not in parameters],
            any(target.transposed for target in targets if target not in parameters),
            parameters=[target.weight for target in parameters],
        )  # fmt: skip
        keys = {place: target.weight if target in parameters else place for place, target in names.items()}
        others = {f"^{escape(keys[place])}$": r for place, r in ranks.items() if r != rank}
        if others:  # AdaLoRA has none: it begins with one rank
            config.rank_pattern = others
            config.alpha_pattern = others if settings.adapter.alpha is None else {}
        config.task_type = "CAUSAL_LM"
        return config


class Lora(PeftMethod):
    """LoRA: W + scale * B A, with B = 0 at the start."""

    name, title = "lora", "LoRA"
    ignored_settings = (*SORSA_SETTINGS, "baseline.adalora_*", "baseline.pissa_*", "baseline.galore_*")
    refused_experts = ""
    matrices = 3

    def layer_config(self, rank: int, baseline: BaselineConfig, initialise: bool, shared: dict[str, Any]) -> LoraConfig:
        from peft import LoraConfig

        return LoraConfig(r=rank, **shared)


class _ChangedWeight(PeftMethod):
    """A LoRA whose first product, taken from the weight itself, is taken off the frozen weight."""

    changes_frozen_weight = True
    refused_exports: Mapping[str, str] = {
        **NO_BASE_EXPORT,
        "adapter": "its A and B go with a frozen weight that PEFT would have to decompose again; --format lora is "
                   "exact on the base",
    }  # fmt: skip


class Pissa(_ChangedWeight):
    """PiSSA: A and B begin as the leading singular triplets of the weight."""

    name, title = "pissa", "PiSSA"
    ignored_settings = (*SORSA_SETTINGS, *EXPERT_SETTINGS, "baseline.adalora_*", "baseline.galore_*")
    matrices = 7  # the decomposition holds four

    def layer_config(self, rank: int, baseline: BaselineConfig, initialise: bool, shared: dict[str, Any]) -> LoraConfig:
        from peft import LoraConfig

        rounds = baseline.pissa_iterations
        start: Any = (f"pissa_niter_{rounds}" if rounds else "pissa") if initialise else True
        return LoraConfig(r=rank, init_lora_weights=start, **shared)

    def lapack_numbers(self, m: int, n: int, baseline: BaselineConfig) -> int:
        """The exact decomposition takes the shorter side squared four times (seen on 1024 x 4096)."""
        return 0 if baseline.pissa_iterations else 4 * min(m, n) ** 2


class Olora(_ChangedWeight):
    """OLoRA: A and B begin as the leading part of the weight's QR decomposition."""

    name, title = "olora", "OLoRA"
    ignored_settings = (*Lora.ignored_settings, *EXPERT_SETTINGS)
    matrices = 6  # the QR decomposition holds three
    adapts_conv1d = False

    def layer_config(self, rank: int, baseline: BaselineConfig, initialise: bool, shared: dict[str, Any]) -> LoraConfig:
        from peft import LoraConfig

        return LoraConfig(r=rank, init_lora_weights="olora" if initialise else True, **shared)


class Dora(PeftMethod):
    """DoRA: a LoRA whose merged weight is scaled row by row to a trained norm."""

    name, title = "dora", "DoRA"
    ignored_settings = (*Lora.ignored_settings, *EXPERT_SETTINGS)
    matrices = 5  # the norm takes two more
    refused_exports: Mapping[str, str] = {
        **NO_BASE_EXPORT, "lora": "what it trains is no plain LoRA; --format adapter is in PEFT's format"
    }  # fmt: skip

    def layer_config(self, rank: int, baseline: BaselineConfig, initialise: bool, shared: dict[str, Any]) -> LoraConfig:
        from peft import LoraConfig

        return LoraConfig(r=rank, use_dora=True, **shared)

    def layer_scratch_bytes(self, targets: Sequence[Target]) -> int:
        """PEFT takes the norm of W + scale * B A: a unit matrix (N, N), B A, the same scaled, W, and their sum."""
        return max(4 * t.in_features * (t.in_features + 4 * t.out_features) for t in targets)


def _more(difference: int) -> str:
    return "as many" if difference == 0 else f"{abs(difference):,} {'more' if difference > 0 else 'fewer'}"
