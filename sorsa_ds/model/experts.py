"""Experts that a model holds as three-dimensional parameters: which there are, and their adaptation by SORSA.

transformers stacks the weights of a layer's experts. Most classes of experts follow its experts interface (they are
marked by `transformers.integrations.moe.use_experts_implementation`), which says what each must compute; for two older
classes that is written down here. Experts of any other class stay as they are.

An adapted module keeps its class's attributes, activation and gate. Only its forward pass is another: tokens are sorted
by expert once, and every weight is called exactly once, whatever the tokens are routed to, so that under ZeRO-3 all
ranks gather alike.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sorsa_ds.sorsa.expert_layer import SorsaExperts
from sorsa_ds.sorsa.routes import Form, Routes

Forward = Callable[..., Tensor]

_MARKS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
"""Attributes that `use_experts_implementation` gives to the modules of a class."""

_FORMS: dict[str | None, Form] = {"eager": "loop", "batched_mm": "batched"}
"""transformers' names of ways to compute experts -> ours; any other is `grouped`."""


@dataclass(frozen=True, slots=True)
class Stack:
    """The weights of all experts of a layer for one of their linears.

    module: name of the module that computes the experts. holder: name of the one that holds the parameter. leaf: the
    parameter's name in it. experts, out_features, in_features: E, M and N. transposed: whether the parameter has the
    order (E, N, M) in place of (E, M, N). flat: whether its first two dimensions are one.
    """

    module: str
    holder: str
    leaf: str
    experts: int
    out_features: int
    in_features: int
    transposed: bool
    flat: bool

    @property
    def name(self) -> str:
        """The parameter's full name."""
        return f"{self.holder}.{self.leaf}"


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a class of experts holds and computes them.

    holder: the submodule that holds the weights; empty: the module itself. weights: name -> whether it is transposed.
    forward: what an adapted module computes. flat: whether a parameter has all experts in its first dimension.
    """

    holder: str
    weights: dict[str, bool]
    forward: Forward
    flat: bool = False


def find_stacks(model: nn.Module) -> tuple[list[Stack], dict[str, str]]:
    """The stacked experts of a model, and other three-dimensional weights of experts -> why they are not adapted."""
    stacks: list[Stack] = []
    for name, module in model.named_modules():
        if (layout := _layout(module)) is None:
            continue
        holder = f"{name}.{layout.holder}" if layout.holder else name
        for leaf, transposed in layout.weights.items():
            parameter = getattr(model.get_submodule(holder), leaf)
            experts = cast(Any, module).num_experts
            first, second = _matrix_shape(parameter, experts)
            m, n = (second, first) if transposed else (first, second)
            stacks.append(Stack(name, holder, leaf, experts, m, n, transposed, layout.flat))
    known = {stack.name for stack in stacks}
    others = {
        name: "its experts are computed in a way that this program does not know"
        for name, parameter in model.named_parameters()
        if name not in known and len(_shape(parameter)) == 3 and "expert" in name.lower() and not name.endswith("bias")
    }
    return stacks, others


def insert_experts(model: nn.Module, stack: Stack, layer: SorsaExperts) -> None:
    """Put an adapted layer in the place of a stacked parameter, and let its module compute with such layers."""
    module, holder = model.get_submodule(stack.module), model.get_submodule(stack.holder)
    kind = type(module)
    if (layout := _layout(module)) is not None and kind.forward is not layout.forward:
        # As torch.nn.utils.parametrize does it: what asks for the original class still finds it.
        module.__class__ = type(kind.__name__, (kind,), {"forward": layout.forward})
    delattr(holder, stack.leaf)
    setattr(holder, stack.leaf, layer)


def put_back(model: nn.Module, name: str, matrices_EMN: Tensor) -> None:
    """Put a frozen parameter with the weights (E, M, N) in the place of the adapted layer of that name.

    Once none of its layers is left, the module computes as its class does.
    """
    holder_name, _, leaf = name.rpartition(".")
    holder = model.get_submodule(holder_name)
    module = holder if _layout(holder) else model.get_submodule(holder_name.rpartition(".")[0])
    layout = _layout(module)
    assert layout is not None
    experts, m, n = matrices_EMN.shape
    first, second = (n, m) if layout.weights[leaf] else (m, n)
    shape = (experts * first, second) if layout.flat else (experts, first, second)
    values = stacked_as(matrices_EMN, shape, layout.weights[leaf]).contiguous()
    setattr(holder, leaf, nn.Parameter(values, requires_grad=False))
    left = any(isinstance(getattr(holder, other), SorsaExperts) for other in layout.weights)
    if not left and type(module).forward is layout.forward:
        module.__class__ = type(module).__mro__[1]


def matrices_of(parameter: Tensor, experts: int, transposed: bool) -> Tensor:
    """The weights (E, M, N) in a stacked parameter."""
    matrices = parameter.view(experts, *_matrix_shape(parameter, experts))
    return matrices.mT if transposed else matrices


def stacked_as(matrices_EMN: Tensor, shape: tuple[int, ...], transposed: bool) -> Tensor:
    """The parameter of this shape that holds the weights (E, M, N)."""
    return (matrices_EMN.mT if transposed else matrices_EMN).reshape(shape)


def _layout(module: Any) -> _Layout | None:
    """How a module computes experts; None where it does not, or in an unknown way."""
    kind = type(module)
    for base in kind.__mro__:
        if base.__name__ in _KNOWN and base.__module__.startswith("transformers."):
            return _KNOWN[base.__name__]
    # A class with a forward pass of its own, below one that follows the interface, computes something else perhaps.
    follows = hasattr(kind.forward, "__wrapped__") or kind.forward is _interface_forward
    if not (follows and all(hasattr(module, mark) for mark in _MARKS)):
        return None
    first = "gate_up_proj" if module.has_gate else "up_proj"
    return _Layout("", dict.fromkeys((first, "down_proj"), module.is_transposed), _interface_forward)


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 empties the shape of a parameter it cuts


def _matrix_shape(parameter: Tensor, experts: int) -> tuple[int, int]:
    """The two sides of each expert's part of a parameter, which may have all experts in its first dimension."""
    *front, last = _shape(parameter)
    return (front[-1] if len(front) == 2 else front[0] // experts), last


def _routed(module: Any, chosen: Tensor) -> tuple[Routes, Tensor]:
    wanted = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return Routes.of(chosen, module.num_experts, _FORMS.get(wanted, "grouped"))


def _gathered(rows: Tensor, order: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The sum of each token's rows, (tokens, H), from rows that are sorted by expert.

    Args:
        shape: (tokens, K).
    """
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return rows[back].view(*shape, rows.shape[-1]).sum(1)


def _interface_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What `transformers.integrations.moe` says that experts compute, (tokens, H)."""
    routes, order = _routed(self, top_k_index)
    rows = hidden_states[order // top_k_index.shape[-1]]
    inner = (self.gate_up_proj if self.has_gate else self.up_proj)(rows, routes)
    if self.has_bias:
        inner = inner + (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias)[routes.expert]
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    rows = self.down_proj(inner, routes)
    if self.has_bias:
        rows = rows + self.down_proj_bias[routes.expert]
    if self.has_post_expert_norm:
        rows = self.post_expert_norm(rows)
    rows = rows * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    return _gathered(rows, order, tuple(top_k_index.shape)).to(hidden_states.dtype)


def _llama4_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """Llama 4's experts: each gets all tokens, scaled by the router, in equal parts of the rows."""
    rows = hidden_states.view(-1, self.hidden_size)
    routes = Routes.even(len(rows), self.num_experts, rows.device, "grouped")
    gate, up = self.gate_up_proj(rows, routes).chunk(2, dim=-1)
    return self.down_proj(up * self.act_fn(gate), routes)


def _dbrx_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """DBRX's experts, (batch, tokens, H)."""
    routes, order = _routed(self, top_k_index)
    rows = hidden_states.reshape(-1, self.hidden_size)[order // top_k_index.shape[-1]]
    inner = self.mlp.activation_fn(self.mlp.w1(rows, routes)) * self.mlp.v1(rows, routes)
    rows = self.mlp.w2(inner, routes) * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    return _gathered(rows, order, tuple(top_k_index.shape)).to(hidden_states.dtype).view(hidden_states.shape)


_KNOWN = {
    "Llama4TextExperts": _Layout("", {"gate_up_proj": True, "down_proj": True}, _llama4_forward),
    "DbrxExperts": _Layout("mlp", {"w1": False, "v1": False, "w2": True}, _dbrx_forward, flat=True),
}
"""Classes of experts outside of transformers' interface."""


def modules_of(stacks: list[Stack]) -> Iterator[list[Stack]]:
    """The stacks of each module, which are adapted together or not at all."""
    names = dict.fromkeys(stack.module for stack in stacks)
    for name in names:
        yield [stack for stack in stacks if stack.module == name]
