"""LoRA, PiSSA, OLoRA, DoRA and AdaLoRA: every adapted linear is PEFT's own layer, made by PEFT on the owning rank.

A layer is made twice: without memory on every rank, to know its parameters, and for real by its owner alone, from the
pre-trained weight. What it holds goes to all ranks then, whole or cut, as SORSA's tensors do. So every rank starts from
the same factors, whatever PEFT draws or decomposes, no rank ever holds the model, and ZeRO-3 needs nothing more.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peft import AdaLoraConfig, LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sorsa_ds.config.schema import BaselineConfig, SorsaConfig
from sorsa_ds.model.fill import Produced, check_finite
from sorsa_ds.model.schedule import Item
from sorsa_ds.model.sharding import TensorSpec
from sorsa_ds.model.targets import Target, select_targets
from sorsa_ds.model.weight_sources import WeightSource
from sorsa_ds.runtime import digest
from sorsa_ds.runtime.precision import Precision, full_fp32_products

ADAPTER = "default"
"""PEFT's name of the one adapter."""

MUTATING = ("pissa", "olora")
"""The methods that take their first product off the frozen weight: W - scale * B_0 A_0."""

Values = Callable[[str, torch.Size], Tensor]
"""Gives a trained tensor, as training began or left it, by name and shape: fp32 on the CPU."""


@dataclass(frozen=True, slots=True)
class PeftLayers:
    """One of the methods that PEFT has, with its settings.

    seed: of what is drawn, together with the layer's name.
    """

    method: str
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
        if self.method == "adalora":
            return AdaLoraConfig(init_r=rank, target_r=rank, total_step=1, **shared)  # the engine has the schedule
        initial: bool | str = True
        if initialise and self.method == "olora":
            initial = "olora"
        if initialise and self.method == "pissa":
            rounds = self.baseline.pissa_iterations
            initial = f"pissa_niter_{rounds}" if rounds else "pissa"
        return LoraConfig(r=rank, use_dora=self.method == "dora", init_lora_weights=initial, **shared)

    def working_set(self, target: Target) -> int:
        """Bytes of a target's layer while its owner makes it: fp32 matrices of its size, and what LAPACK takes.

        The weight, the copy that PEFT changes, and a message; DoRA's norm takes two more, OLoRA's QR three, PiSSA's
        decomposition four, and LAPACK the shorter side squared four times if it is exact (seen on 1024 x 4096).
        """
        m, n = target.out_features, target.in_features
        numbers = {"lora": 3, "adalora": 3, "dora": 5, "olora": 6, "pissa": 7}[self.method] * m * n
        if self.method == "pissa" and not self.baseline.pissa_iterations:
            numbers += 4 * min(m, n) ** 2
        return 4 * (numbers + 2 * self.rank(target) * (m + n + 1))

    def rank(self, target: Target) -> int:
        """The rank with which a target's layer is made."""
        return (self.baseline.adalora_init_rank or target.rank) if self.method == "adalora" else target.rank

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
        if self.method in MUTATING and real:
            with torch.no_grad():
                if initial is not None:
                    set_trained(layer, target, initial)
                # Not what PEFT has left there: made of the factors, in the same way at the start and ever after.
                mutated = weight - delta(layer, target)
                layer.base_layer.weight.data = mutated.t().contiguous() if target.transposed else mutated
        return layer

    def operate(self, model: PreTrainedModel, precision: Precision) -> list[Target]:
        """Freeze a model without memory, and put PEFT's layers, without memory too, around its targets.

        Raises:
            ValueError: bad targets, or a linear that the method cannot adapt.
        """
        targets = select_targets(model, self.sorsa)
        model.requires_grad_(False)
        for target in targets:
            if target.transposed and self.method == "olora":
                raise ValueError(f"method olora: PEFT's OLoRA takes no Conv1D ({target.name}); choose another method")
            if (rank := self.rank(target)) > min(target.out_features, target.in_features):
                raise ValueError(f"baseline.adalora_init_rank: {rank} exceeds min(out, in) of {target.name}")
            parent, _, leaf = target.name.rpartition(".")
            weight = torch.empty(target.out_features, target.in_features, device="meta")
            bias = torch.empty(target.out_features, device="meta") if target.bias else None
            layer = self.layer(target, weight, bias)
            for parameter in layer.parameters():
                parameter.data = parameter.data.to(precision.factor_dtype)
            setattr(model.get_submodule(parent), leaf, layer)
        return targets


@dataclass(frozen=True, slots=True)
class PeftRecipe:
    """What PEFT's layers hold, of a target; everything else as it is.

    initial, trained: the trained tensors as training began and as it left them, where it has begun.
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
        if item.name not in self._specs:  # they are asked for before the layer is filled, and perhaps cut
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
    """What a layer's product adds to its frozen weight, (M, N) in fp32, as PEFT computes it."""
    added = layer.get_delta_weight(ADAPTER)
    return added.t() if target.transposed else added


def merged(layer: nn.Module, target: Target) -> Tensor:
    """The whole weight (M, N) that a layer stands for, merged by PEFT."""
    weight = plain(layer).weight.detach()
    return weight.t() if target.transposed else weight


@torch.no_grad()
def plain(layer: nn.Module) -> nn.Module:
    """The linear (or Conv1D) that a layer stands for, merged by PEFT in fp32."""
    for parameter in layer.parameters():
        parameter.data = parameter.data.float()
    layer.merge()
    return layer.base_layer
