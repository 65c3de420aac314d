"""What is adapted: a linear, or the linears of all experts of a layer; and its replacement by a SORSA layer.

The new layers are made on the meta device, so replacing takes no memory; `sorsa_ds.model.fill` fills them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sorsa_ds.config.schema import AdapterConfig
from sorsa_ds.model.experts import find_stacks, insert_experts, matrices_of
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa.expert_layer import SorsaExperts
from sorsa_ds.sorsa.layer import SorsaLinear
from sorsa_ds.sorsa.residual_storage import Storage


@dataclass(frozen=True, slots=True)
class Target:
    """One linear to adapt, or the linears of all experts of a layer that the model holds as one parameter.

    transposed: whether its weight is stored as (in, out), as in GPT-2's Conv1D and GPT-OSS's experts.
    shared: names of further linears that have the same weight, as in Zamba's shared blocks. They are one layer.
    experts: how many matrices (out, in) the parameter holds, each of which is adapted by itself; 0: a linear.
    """

    name: str
    out_features: int
    in_features: int
    rank: int
    bias: bool
    transposed: bool
    shared: tuple[str, ...] = ()
    experts: int = 0

    @property
    def places(self) -> tuple[str, ...]:
        """Every name in the model under which the layer stands."""
        return self.name, *self.shared

    @property
    def matrices(self) -> int:
        """How many matrices are adapted: one, or one of each expert."""
        return max(1, self.experts)

    @property
    def numel(self) -> int:
        """Numbers of the weight, of all experts together."""
        return self.matrices * self.out_features * self.in_features

    @property
    def trainable(self) -> int:
        """How many parameters SORSA trains in the layer: r (m + n + 1), of all experts together."""
        return self.matrices * self.rank * (self.out_features + self.in_features + 1)

    @property
    def weight(self) -> str:
        """The name of the base model's parameter."""
        return self.name if self.experts else f"{self.name}.weight"

    @property
    def holder(self) -> str:
        """The name of the module that has the linear, or the parameter of experts."""
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """Its name in that module."""
        return self.name.rpartition(".")[2]

    def shaped(self, *shape: int) -> torch.Size:
        """The shape of a tensor of the layer that has this shape for each matrix."""
        return torch.Size((self.experts, *shape) if self.experts else shape)

    def each(self, tensor: Tensor) -> Sequence[Tensor]:
        """A tensor of the layer, matrix by matrix."""
        return tensor.unbind() if self.experts else [tensor]

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """What `each` takes apart."""
        return torch.stack(list(tensors)) if self.experts else tensors[0]

    def one(self, number: int) -> "Target":
        """A target that stands for a single matrix."""
        return replace(self, name=f"{self.name}.{number}", experts=0) if self.experts else self

    @property
    def layout(self) -> dict[str, int]:
        """The layer's shape and rank, as the description of an adapter has them."""
        own = {"out": self.out_features, "in": self.in_features, "rank": self.rank}
        return own | ({"experts": self.experts} if self.experts else {})


def as_matrices(weight: Tensor, target: Target) -> Tensor:
    """The base model's parameter of a target as (M, N), or as (E, M, N) where it is of experts."""
    if target.experts:
        return matrices_of(weight, target.experts, target.transposed)
    return weight.t() if target.transposed else weight


def counted(targets: Sequence[Target]) -> str:
    """How many linears and weights of experts some targets are, in words."""
    stacks = Counter(target.experts for target in targets if target.experts)
    linears = [f"{len(targets) - stacks.total()} linears"] if len(targets) > stacks.total() else []
    return ", ".join([*linears, *(f"the weights of {experts} experts x {count}" for experts, count in stacks.items())])


def factor_shapes(target: Target) -> dict[str, torch.Size]:
    """Shapes of the factors of a target: U (M, R), s (R,), V (N, R), with E before them where it is of experts."""
    m, n, r = target.out_features, target.in_features, target.rank
    return {"U": target.shaped(m, r), "s": target.shaped(r), "V": target.shaped(n, r)}


def insert_sorsa_layers(
    model: nn.Module, targets: list[Target], adapter: AdapterConfig, precision: Precision, storage: Storage
) -> None:
    """Freeze the model and put an uninitialised SorsaLinear (on the meta device) in the place of each target."""
    model.requires_grad_(False)
    stacks = {stack.name: stack for stack in find_stacks(model)[0]}
    for target in targets:
        shape = target.in_features, target.out_features, target.rank
        made: dict[str, Any] = {
            "scale": adapter.scale(target.rank), "dropout": adapter.dropout, "device": "meta", "storage": storage,
            "factor_dtype": precision.factor_dtype,
        }  # fmt: skip
        if target.experts:
            insert_experts(model, stacks[target.name], SorsaExperts(target.experts, *shape, **made))
        else:
            layer = SorsaLinear(*shape, bias=target.bias, bias_dtype=precision.residual_dtype, **made)
            replace_linear(model, target, layer)


def replace_linear(model: nn.Module, target: Target, layer: nn.Module) -> None:
    """Put a layer in the place of a target: the same one in each of its places."""
    for place in target.places:
        parent, _, leaf = place.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
