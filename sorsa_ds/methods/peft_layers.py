"""LoRA, PiSSA, OLoRA, DoRA and AdaLoRA: every adapted linear is PEFT's own layer, made by PEFT on the owning rank.

A layer is made twice: without memory on every rank, to know its parameters, and for real by its owner alone, from the
pre-trained weight. What it holds goes to all ranks then, whole or cut, as SORSA's tensors do. So every rank starts from
the same factors, whatever PEFT draws or decomposes, no rank ever holds the model, and ZeRO-3 needs nothing more.
"""

from dataclasses import dataclass, field
from typing import cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sorsa_ds.config.schema import BaselineConfig, SorsaConfig
from sorsa_ds.methods.families.peft_adapters import ADAPTER, PeftMethod
from sorsa_ds.methods.method import Values
from sorsa_ds.model.fill import Produced, check_finite
from sorsa_ds.model.schedule import Item
from sorsa_ds.model.sharding import TensorSpec
from sorsa_ds.model.targets import Selection, Target, choose, replace_linear
from sorsa_ds.model.weight_sources import WeightSource
from sorsa_ds.runtime import digest
from sorsa_ds.runtime.numerics import full_fp32_products
from sorsa_ds.runtime.precision import Precision


@dataclass(frozen=True, slots=True)
class PeftLayers:
    """PEFT's layers of one method, with its settings.

    seed: seeds, together with a layer's name, what is drawn for it.
    """

    method: PeftMethod
    sorsa: SorsaConfig
    baseline: BaselineConfig
    seed: int = 0

    def config(self, rank: int, targets: list[str], transposed: bool, initialise: bool = True) -> LoraConfig:
        """PEFT's configuration of linears of this rank. Without `initialise` nothing is decomposed."""
        shared = {
            "lora_alpha": rank if self.sorsa.alpha is None else self.sorsa.alpha,
            "lora_dropout": self.sorsa.dropout,
            "target_modules": targets,
            "fan_in_fan_out": transposed,
        }
        return self.method.layer_config(rank, self.baseline, initialise, shared)

    def rank(self, target: Target) -> int:
        """The rank with which a target's layer is made."""
        return self.method.rank(target, self.baseline)

    def layer(self, target: Target, weight: Tensor, bias: Tensor | None, initial: Values | None = None) -> nn.Module:
        """PEFT's layer around a linear with this weight (M, N).

        Args:
            initial: the tensors with which training began, if it has: the frozen weight is made with them.
        """
        m, n = target.out_features, target.in_features
        with torch.device("meta"):
            linear = Conv1D(m, n) if target.transposed else nn.Linear(n, m)
        own = weight.clone()  # PEFT takes the product off in place
        linear.weight = nn.Parameter(own.t() if target.transposed else own, requires_grad=False)
        linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        holder = nn.Module()
        holder.linear = linear
        real = weight.device.type != "meta"
        config = self.config(self.rank(target), ["linear"], target.transposed, initialise=real and initial is None)
        with torch.random.fork_rng(), torch.device(weight.device):
            torch.manual_seed(int(digest.of_bytes(f"{self.seed} {target.name}".encode())[:15], 16))
            inject_adapter_in_model(config, holder, ADAPTER)
        layer = holder.linear
        if self.method.changes_frozen_weight and real:
            with torch.no_grad():
                if initial is not None:
                    set_trained(layer, target, initial)
                # PEFT's own frozen weight is replaced by one that is made from the factors: a run that goes on must
                # find the same numbers, and has only the factors.
                mutated = weight - delta(layer, target)
                frozen_linear(layer).weight.data = mutated.t().contiguous() if target.transposed else mutated
        return layer

    def operate(self, model: PreTrainedModel, precision: Precision) -> Selection:
        """Freeze a model without memory, and put PEFT's layers, without memory too, around its targets.

        Raises:
            ValueError: bad targets, or a linear that the method cannot adapt.
        """
        selection = choose(model, self.sorsa)
        model.requires_grad_(False)
        for target in selection.targets:
            if target.transposed and not self.method.adapts_conv1d:
                raise ValueError(
                    f"method {self.method.name}: PEFT's {self.method.title} takes no Conv1D ({target.name}); choose "
                    f"another method"
                )
            if (rank := self.rank(target)) > min(target.out_features, target.in_features):
                raise ValueError(f"baseline.adalora_init_rank: {rank} exceeds min(out, in) of {target.name}")
            weight = torch.empty(target.out_features, target.in_features, device="meta")
            bias = torch.empty(target.out_features, device="meta") if target.bias else None
            layer = self.layer(target, weight, bias)
            for parameter in layer.parameters():
                parameter.data = parameter.data.to(precision.factor_dtype)
            replace_linear(model, target, layer)
        return selection


@dataclass(frozen=True, slots=True)
class PeftRecipe:
    """Fills a model with PEFT's layers: a target gets what its layer holds, every other parameter stays as it is.

    initial, trained: give the trained tensors as training began and as it left them, where it has begun.
    """

    layers: PeftLayers
    model: nn.Module
    precision: Precision
    device: torch.device
    initial: Values | None = None
    trained: Values | None = None
    _specs: dict[str, list[TensorSpec]] = field(default_factory=dict)

    def specs(self, item: Item) -> list[TensorSpec]:
        if item.target is None:
            return [TensorSpec(item.name, item.shape, self.precision.residual_dtype)]
        if item.name not in self._specs:  # kept, because ZeRO-3 cuts the layer's parameters once they are filled
            self._specs[item.name] = [
                TensorSpec(f"{item.name}.{leaf}", parameter.shape,
                           torch.float32 if parameter.requires_grad else self.precision.residual_dtype,
                           trainable=parameter.requires_grad)
                for leaf, parameter in self.model.get_submodule(item.name).named_parameters()
            ]  # fmt: skip
        return self._specs[item.name]

    def produce(self, item: Item, source: WeightSource) -> Produced:
        weight, bias = source.read(item)
        weight = check_finite(item.name, weight.to(self.device))
        target = item.target
        if target is None:
            return [weight], []
        with full_fp32_products():
            layer = self.layers.layer(
                target, weight.float(), None if bias is None else bias.to(self.device), self.initial
            )
        if self.trained is not None:
            set_trained(layer, target, self.trained)
        return [parameter.detach() for parameter in layer.parameters()], []


def set_trained(layer: nn.Module, target: Target, values: Values) -> None:
    """Give a layer its trained tensors."""
    for leaf, parameter in layer.named_parameters():
        if parameter.requires_grad:
            parameter.data = values(f"{target.name}.{leaf}", parameter.shape).to(parameter.device)


@torch.no_grad()
def delta(layer: nn.Module, target: Target) -> Tensor:
    """The (M, N) matrix in fp32 that a layer adds to its frozen weight, as PEFT computes it."""
    added = cast(Linear, layer).get_delta_weight(ADAPTER)
    return added.t() if target.transposed else added


@torch.no_grad()
def plain_linear(layer: nn.Module) -> nn.Linear | Conv1D:
    """The linear (or Conv1D) that a layer of PEFT's stands for, merged by PEFT in fp32; changes the layer."""
    for parameter in layer.parameters():
        parameter.data = parameter.data.float()
    cast(BaseTunerLayer, layer).merge()
    return frozen_linear(layer)


def frozen_linear(layer: nn.Module) -> nn.Linear | Conv1D:
    """The linear (or Conv1D) around which a layer of PEFT's was put."""
    return cast(nn.Linear | Conv1D, layer.base_layer)
