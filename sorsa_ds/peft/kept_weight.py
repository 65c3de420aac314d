"""How a base weight comes back bit for bit after an adapter was merged into it and taken out again.

Adding a change and subtracting it again rounds twice. A trainer that merges before every generation, as TRL's do with
vLLM, would let the base model drift away from itself, and with it the reference model. What a packed layer held is
kept as it is, which is small. Of a plain weight only the numbers are kept that the subtraction alone would not bring
back: a few per cent where a change is small against the weight.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True, slots=True)
class KeptNumbers:
    """The numbers of a plain weight that the subtraction of a change does not bring back.

    places: their places in the flattened weight, (K,); None: all of them. values: they themselves, (K,), or the whole
    weight.
    """

    places: Tensor | None
    values: Tensor

    @classmethod
    def of(cls, before: Tensor, back: Tensor) -> "KeptNumbers":
        """Compare a weight before a merge with what the subtraction makes of the merged one, in one dtype."""
        places = (before != back).flatten().nonzero().squeeze(1)
        size = places.element_size() if before.numel() > 2**31 else 4
        if len(places) * (size + before.element_size()) > before.numel() * before.element_size():
            return cls(None, before.clone())
        return cls(places.to(torch.int32) if size == 4 else places, before.flatten()[places])

    def correct(self, back: Tensor) -> Tensor:
        """The weight before the merge, from what the subtraction has made; that itself where its dtype is another."""
        if back.dtype != self.values.dtype:
            return back
        if self.places is None:
            return self.values.to(back.device)
        flat = back.contiguous().view(-1)
        flat[self.places.to(back.device, torch.int64)] = self.values.to(back.device)
        return flat.view(back.shape)


def can_be_compared(weight: Tensor) -> bool:
    """Whether a weight is whole on this process: places in it mean nothing where it is cut into shards."""
    return not isinstance(weight, DTensor)


@dataclass(slots=True)
class KeptPacked:
    """What a packed base layer holds before anything is merged into it.

    The libraries that pack make a new parameter, or a new layer, and change attributes of the old one on the way.
    """

    outer: nn.Module
    layer: nn.Module
    parameters: dict[str, nn.Parameter | None]
    attributes: dict[str, dict[str, Any]]
    states: dict[str, Any]
    merged: Tensor | None = None

    @classmethod
    def of(cls, outer: nn.Module, layer: nn.Module) -> "KeptPacked":
        """Take note of a packed layer.

        Args:
            outer: what the adapter wraps. layer: the packed linear in it, often the same one.
        """
        parameters = dict(layer._parameters)
        attributes = {name: dict(one.__dict__) for name, one in parameters.items() if one is not None}
        states = {name: copy.copy(getattr(layer, name)) for name in ("state", "quant_state") if hasattr(layer, name)}
        return cls(outer, layer, parameters, attributes, states)

    def after_merge(self, layer: nn.Module) -> None:
        """Take note of the merged weight, by which `brings_back` knows that nothing else has replaced it."""
        self.merged = layer._parameters.get("weight")

    def brings_back(self, layer: nn.Module) -> bool:
        """Whether the layer still holds what the merge has put there, on the device where it was."""
        now, before = layer._parameters.get("weight"), self.parameters.get("weight")
        if now is None or before is None:
            return layer is not self.layer
        return now is self.merged and now.device == before.device

    def bring_back(self) -> nn.Module:
        """Put everything back; returns the module that the adapter is to wrap."""
        self.layer._parameters.update(self.parameters)
        for name, kept in self.attributes.items():
            self.layer._parameters[name].__dict__.update(kept)  # type: ignore[union-attr]
        for name, state in self.states.items():
            setattr(self.layer, name, state)
        return self.outer
