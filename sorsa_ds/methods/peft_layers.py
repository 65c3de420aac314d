"""LoRA, PiSSA, OLoRA, DoRA and AdaLoRA: every adapted weight has PEFT's own layer, made by PEFT on the owning rank.

A layer is made twice: without memory on every rank, to know its parameters, and for real by its owner alone, from the
pre-trained weight. What it holds goes to all ranks then, whole or cut, as SORSA's tensors do. So every rank starts from
the same factors, whatever PEFT draws or decomposes, no rank ever holds the model, and ZeRO-3 needs nothing more.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from deepspeed.utils import set_z3_leaf_module
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sorsa_ds.config.schema import AdapterConfig, BaselineConfig
from sorsa_ds.methods.families.peft_adapters import PeftMethod
from sorsa_ds.methods.method import Values
from sorsa_ds.methods.peft_experts import bare, layer_names
from sorsa_ds.model.experts import stacked_as
from sorsa_ds.model.fill import Produced, check_finite
from sorsa_ds.model.peft_names import ONLY_ADAPTER
from sorsa_ds.model.schedule import Item
from sorsa_ds.model.selection import Selection
from sorsa_ds.model.sharding import TensorSpec
from sorsa_ds.model.targets import Target, as_matrices, replace_linear
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
    adapter: AdapterConfig
    baseline: BaselineConfig
    seed: int = 0

    def config(
        self,
        rank: int,
        targets: Sequence[str],
        transposed: bool,
        initialise: bool = True,
        parameters: Sequence[str] = (),
    ) -> LoraConfig:
        """PEFT's configuration of linears and parameters of this rank. Without `initialise` nothing is decomposed."""
        shared: dict[str, Any] = {
            "lora_alpha": rank if self.adapter.alpha is None else self.adapter.alpha,
            "use_rslora": self.adapter.rslora,
            "lora_dropout": self.adapter.dropout,
            "target_modules": list(targets),
            "fan_in_fan_out": transposed,
        }
        if parameters:
            shared["target_parameters"] = list(parameters)
        return self.method.layer_config(rank, self.baseline, initialise, shared)

    def rank(self, target: Target) -> int:
        """The rank with which a target's layer is made."""
        return self.method.rank(target, self.baseline)

    def layer(
        self,
        target: Target,
        weight: Tensor,
        bias: Tensor | None,
        initial: Values | None = None,
        holder: nn.Module | None = None,
    ) -> nn.Module:
        """PEFT's layer around a linear with this weight (M, N), or around experts with these (E, M, N).

        Args:
            initial: the tensors with which training began, if it has: the frozen weight is made with them.
            holder: the model's own module that holds the parameter of experts.
        """
        if target.experts:
            assert holder is not None
            return self._experts_layer(target, weight, holder)
        m, n = target.out_features, target.in_features
        with torch.device("meta"):
            linear = Conv1D(m, n) if target.transposed else nn.Linear(n, m)
        own = weight.clone()  # PEFT takes the product off in place
        linear.weight = nn.Parameter(own.t() if target.transposed else own, requires_grad=False)
        linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        around = nn.Module()
        around.linear = linear
        real = weight.device.type != "meta"
        config = self.config(self.rank(target), ["linear"], target.transposed, initialise=real and initial is None)
        self._inject(config, around, target, weight.device)
        layer = around.linear
        if self.method.changes_frozen_weight and real:
            with torch.no_grad():
                if initial is not None:
                    set_trained(layer, target.name, initial)
                # PEFT's own frozen weight is replaced by one that is made from the factors: a run that goes on must
                # find the same numbers, and has only the factors.
                mutated = weight - delta(layer, target)
                frozen_weight(layer).data = mutated.t().contiguous() if target.transposed else mutated
        return layer

    def _experts_layer(self, target: Target, weight_EMN: Tensor, holder: nn.Module) -> nn.Module:
        """PEFT's layer around a module with nothing but this parameter, which PEFT reads as it reads `holder`'s."""
        leaf = target.leaf
        around, own = nn.Module(), nn.Module()
        shape = tuple(weight_EMN.mT.shape if target.transposed else weight_EMN.shape)
        own.register_parameter(
            leaf, nn.Parameter(stacked_as(weight_EMN, shape, target.transposed), requires_grad=False)
        )
        cast(Any, own).is_transposed = getattr(holder, "is_transposed", False)
        around.experts = own
        config = self.config(self.rank(target), [], False, parameters=[f"experts.{leaf}"])
        self._inject(config, around, target, weight_EMN.device)
        return around.experts

    def _inject(self, config: LoraConfig, around: nn.Module, target: Target, device: torch.device) -> None:
        """Let PEFT put its layers into a module; what it draws for a target depends on the target's name only."""
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(int(digest.of_bytes(f"{self.seed} {target.name}".encode())[:15], 16))
            inject_adapter_in_model(config, around, ONLY_ADAPTER)

    def operate(self, model: PreTrainedModel, precision: Precision) -> Selection:
        """Freeze a model without memory, and put PEFT's layers, without memory too, around its targets.

        Raises:
            ValueError: bad targets, or one that the method cannot adapt.
        """
        selection = self.method.choose(model, self.adapter)
        model.requires_grad_(False)
        names = layer_names(model)
        for target in selection.targets:
            if target.transposed and not target.experts and not self.method.adapts_conv1d:
                raise ValueError(
                    f"method {self.method.name}: PEFT's {self.method.title} takes no Conv1D ({target.name}); choose "
                    f"another method"
                )
            if (rank := self.rank(target)) > min(target.out_features, target.in_features):
                raise ValueError(f"baseline.adalora_init_rank: {rank} exceeds min(out, in) of {target.name}")
            if not target.experts:
                self._wrap_linear(model, target, precision)
        holders: dict[str, list[Target]] = {}
        for target in selection.targets:
            if target.experts:
                holders.setdefault(target.holder, []).append(target)
        for holder, targets in holders.items():
            self._wrap_experts(model, holder, targets, precision)
        layers = {bare(name) + f".{module.parameter_name}": name
                  for name, module in model.named_modules() if isinstance(module, ParamWrapper)}  # fmt: skip
        assert layers == {name: names[name] for name in layers}, "PEFT's layers lie in another order"
        return selection

    def _wrap_linear(self, model: PreTrainedModel, target: Target, precision: Precision) -> None:
        """Put PEFT's layer around a linear."""
        weight = torch.empty(target.out_features, target.in_features, device="meta")
        bias = torch.empty(target.out_features, device="meta") if target.bias else None
        layer = self.layer(target, weight, bias)
        for parameter in layer.parameters():
            parameter.data = parameter.data.to(precision.factor_dtype)
        replace_linear(model, target, layer)

    def _wrap_experts(self, model: PreTrainedModel, name: str, targets: list[Target], precision: Precision) -> None:
        """Put PEFT's layers around the module of that name, one for each parameter of its experts.

        Raises:
            ValueError: there is dropout, which PEFT has for linears alone, or a single transposed expert.
        """
        module = model.get_submodule(name)
        if self.adapter.dropout:
            raise ValueError(
                f"adapter.dropout={self.adapter.dropout}: PEFT's {self.method.title} has no dropout for experts that "
                f"are held as one parameter ({targets[0].name}); adapter.dropout=0 or adapter.experts=frozen"
            )
        if targets[0].experts == 1 and getattr(module, "is_transposed", False):
            raise ValueError(
                f"{targets[0].name}: PEFT takes the single expert for the transposed matrix; adapter.experts=frozen"
            )
        around = nn.Module()
        around.experts = module
        ranks = {f"^experts[.]{target.leaf}": self.rank(target) for target in targets}
        leaves = [f"experts.{target.leaf}" for target in targets]
        config = self.config(self.rank(targets[0]), [], False, parameters=leaves)
        config.rank_pattern = ranks
        config.alpha_pattern = ranks if self.adapter.alpha is None else {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following .*_pattern keys")  # PEFT follows them for parameters
            self._inject(config, around, targets[0], torch.device("meta"))
        for parameter in around.experts.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(precision.factor_dtype)
        # ZeRO-3 gathers what a module holds before its own forward pass. The factors' modules are never called: their
        # weights are read by the layer, which therefore is gathered with all that is in it.
        set_z3_leaf_module(around.experts, True)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, around.experts)


@dataclass(frozen=True, slots=True)
class PeftRecipe:
    """Fills a model with PEFT's layers: a target gets what its layer holds, every other parameter stays as it is.

    names: the parameters of the model that hold experts -> the name of PEFT's layer for each.
    initial, trained: give the trained tensors as training began and as it left them, where it has begun.
    """

    layers: PeftLayers
    model: nn.Module
    precision: Precision
    device: torch.device
    names: dict[str, str]
    initial: Values | None = None
    trained: Values | None = None
    _specs: dict[str, list[TensorSpec]] = field(default_factory=dict)

    def specs(self, item: Item) -> list[TensorSpec]:
        if item.target is None:
            return [TensorSpec(item.name, item.shape, self.precision.residual_dtype)]
        if item.name not in self._specs:  # kept, because ZeRO-3 cuts the layer's parameters once they are filled
            self._specs[item.name] = [
                TensorSpec(name, parameter.shape,
                           torch.float32 if parameter.requires_grad else self.precision.residual_dtype,
                           trainable=parameter.requires_grad)
                for name, parameter in self._parameters(item.target)
            ]  # fmt: skip
        return self._specs[item.name]

    def _parameters(self, target: Target) -> list[tuple[str, nn.Parameter]]:
        """The parameters of a target's layer, by their names in the model: the frozen weight first."""
        if not target.experts:
            found = self.model.get_submodule(target.name).named_parameters()
            return [(f"{target.name}.{leaf}", parameter) for leaf, parameter in found]
        layer = self.model.get_submodule(self.names[target.name])
        own = [(leaf, parameter) for leaf, parameter in layer.named_parameters()
               if bare(f".{leaf}") == f".{target.leaf}" or leaf.startswith("lora_")]  # fmt: skip
        return [(f"{self.names[target.name]}.{leaf}", parameter) for leaf, parameter in own]

    def produce(self, item: Item, source: WeightSource) -> Produced:
        target = item.target
        if target is None:
            weight, _ = source.read(replace(item, name=bare(item.name)))  # it may lie beside wrapped parameters
            return [check_finite(item.name, weight.to(self.device))], []
        weight, bias = source.read(item)
        weight = check_finite(item.name, weight.to(self.device))
        name, holder = target.name, None
        if target.experts:
            name = self.names[target.name]
            holder = cast(ParamWrapper, self.model.get_submodule(name)).get_base_layer()
        with full_fp32_products():
            layer = self.layers.layer(
                target, weight.float(), None if bias is None else bias.to(self.device), self.initial, holder
            )
        if self.trained is not None:
            set_trained(layer, name, self.trained)
        return [parameter.detach() for parameter in layer.parameters()], []


def set_trained(layer: nn.Module, name: str, values: Values) -> None:
    """Give a layer, which has that name in the model, its trained tensors."""
    for leaf, parameter in layer.named_parameters():
        if parameter.requires_grad:
            parameter.data = values(f"{name}.{leaf}", parameter.shape).to(parameter.device)


@torch.no_grad()
def delta(layer: nn.Module, target: Target) -> Tensor:
    """The (M, N) matrix in fp32 that a layer adds to its frozen weight, as PEFT computes it."""
    added = cast(Linear, layer).get_delta_weight(ONLY_ADAPTER)
    return added.t() if target.transposed else added


@torch.no_grad()
def plain_module(layer: nn.Module) -> nn.Module:
    """The linear, Conv1D or module of experts that a layer of PEFT's stands for, merged by PEFT in fp32.

    It changes the layer, and those of the other parameters of the same experts that are inside of it.
    """
    for parameter in layer.parameters():
        parameter.data = parameter.data.float()
    inner: Any = layer
    while isinstance(inner, BaseTunerLayer):
        inner.merge()
        inner = cast(Any, inner).base_layer
    return inner


def merged_matrices(layer: nn.Module, target: Target) -> Tensor:
    """The weight (M, N) of a target's layer, or those of experts (E, M, N), merged by PEFT; changes the layer."""
    plain_module(layer)
    return as_matrices(frozen_weight(layer).detach(), target)


def frozen_weight(layer: nn.Module) -> nn.Parameter:
    """The weight, in the model's own layout, around which a layer of PEFT's was put."""
    if isinstance(layer, ParamWrapper):
        return cast(nn.Parameter, layer.get_param())
    return cast(nn.Parameter, cast(nn.Linear | Conv1D, layer.base_layer).weight)
