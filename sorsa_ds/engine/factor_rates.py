"""Learning rates of their own for the columns of U and V and for s, on fp32 masters that ZeRO has partitioned.

The optimizer takes its step as ever. Then the way that a number has gone is multiplied by its rate, between the
optimizer and the copy into the model. That is what a parameter group with another learning rate would do, weight decay
included, also where a master holds several tensors, and where a rate belongs to a column. With s in log space the
gradient of s is replaced by that of log s, and the optimizer's step is taken as a step of log s:

    d L / d log s = s d L / d s            s' = s exp(step)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sorsa_ds.config.method_settings import SorsaConfig
from sorsa_ds.engine.masters import Fragment, Masters
from sorsa_ds.runtime import collectives

LEAST_SHARE = 1e-3
"""Singular values below this share of their matrix's largest trained one count as this share: a step divided by a
vanishing s would have no bound."""


class FactorRates:
    """Multiplies the steps of U, s and V by rates of their own. Constructing it is a collective call.

    The rates of columns follow from the singular values with which training begins. A checkpoint keeps these, since
    the masters of a run that goes on hold others.

    Args:
        settings: the rates (`column_rates`, `s_lr_ratio`, `s_space`).
        masters: this rank's fragments.
        shapes: full shapes of all trained tensors, in the same order on every rank.
        device: where the collective call is made.
    """

    def __init__(self, settings: SorsaConfig, masters: Masters, shapes: dict[str, torch.Size], device: torch.device):
        self._settings, self._device = settings, device
        layers = {name.removesuffix(".U") for name in shapes if name.endswith(".U")}
        self._shapes = {layer: shape for name, shape in shapes.items() if (layer := name.removesuffix(".s")) in layers}
        ours = [(f, *f.name.rpartition(".")[::2]) for f in masters.fragments]
        self._factors = [f for f, layer, leaf in ours if layer in layers and leaf in ("U", "V")]
        self._values = [f for f, layer, leaf in ours if layer in layers and leaf == "s"]
        self._before: list[tuple[Fragment, Tensor]] = []
        self._by_layer: dict[str, Tensor] = {}
        self.initial_s = self._gathered_values(masters.sharded)

    @property
    def initial_s(self) -> Tensor:
        """The s of all layers with which training began, one behind the other, in fp32 on the CPU."""
        return self._initial_s

    @initial_s.setter
    def initial_s(self, flat: Tensor) -> None:
        sizes = [shape.numel() for shape in self._shapes.values()]
        assert flat.numel() == sum(sizes), "the checkpoint has singular values of other layers"
        self._initial_s = flat
        for (name, shape), own in zip(self._shapes.items(), flat.split(sizes), strict=True):
            s = own.view(shape).abs()
            least = LEAST_SHARE * s.amax(-1, keepdim=True)
            s = torch.where(least > 0, torch.maximum(s, least), 1.0)  # a matrix of zeros has no scale of its own
            self._by_layer[name] = s.pow(-self._settings.column_power).to(self._device)

    @torch.no_grad()
    def begin(self, masters: Sequence[Tensor]) -> None:
        """Remember where the factors in these masters are, before the inner optimizer steps."""
        ours = set(map(id, masters))
        in_log = self._settings.s_space == "log"
        for fragment in self._values:
            if in_log and id(fragment.master) in ours:
                fragment.gradient().mul_(fragment.values())
        moved = [*(self._factors if self._settings.column_power else []), *self._values]
        self._before = [(f, f.values().clone()) for f in moved if id(f.master) in ours]

    @torch.no_grad()
    def end(self) -> None:
        """Multiply the ways that the factors have gone since `begin` by their rates."""
        for fragment, before in self._before:
            step = fragment.values() - before
            if not fragment.name.endswith(".s"):
                fragment.values().copy_(before.addcmul_(step, self._rates(fragment).to(before)))
            elif self._settings.s_space == "log":
                fragment.values().copy_(before.mul_(step.mul_(self._settings.s_lr_ratio).exp_()))
            else:
                fragment.values().copy_(before.add_(step, alpha=self._settings.s_lr_ratio))
        self._before = []

    def _rates(self, fragment: Fragment) -> Tensor:
        """The rate of every number of a fragment of U or V, (numel,)."""
        rank, numbers = fragment.shape[-1], fragment.shape[-2:].numel()
        rates = self._by_layer[fragment.name.rpartition(".")[0]].view(-1)
        places = torch.arange(fragment.start, fragment.start + fragment.numel, device=rates.device)
        return rates[places // numbers * rank + places % rank]  # experts have rates of their own, one after the other

    def _gathered_values(self, sharded: bool) -> Tensor:
        """The s of all layers as the masters hold them, on every rank. A collective call."""
        flat = torch.zeros(sum(shape.numel() for shape in self._shapes.values()), device=self._device)
        places = flat.split([shape.numel() for shape in self._shapes.values()])
        by_layer = dict(zip(self._shapes, places, strict=True))
        for fragment in self._values:
            own = by_layer[fragment.name.removesuffix(".s")]
            own[fragment.start : fragment.start + fragment.numel] = fragment.values().to(flat)
        if sharded:
            collectives.sum_over_ranks([flat])
        return flat.cpu()
