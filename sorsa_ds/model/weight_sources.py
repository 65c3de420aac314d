"""Where the rank that makes a layer gets its pre-trained weight from: the disk, or the ranks' shards in memory."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sorsa_ds.model.pretrained import PretrainedWeights
from sorsa_ds.model.schedule import Item
from sorsa_ds.model.targets import Target, as_matrices
from sorsa_ds.model.weight_conversion import Origin
from sorsa_ds.runtime import collectives, digest


class WeightSource(Protocol):
    """Gives each rank the whole tensors of the item that it owns in a round."""

    def exchange(self, items: list[Item | None]) -> None:
        """Bring this rank what it needs of the other ranks for `items` (by owner). A collective call."""

    def read(self, item: Item) -> tuple[Tensor, Tensor | None]:
        """(weight of a target, its bias or None), or (the parameter, None). Only the owner calls it.

        The weight is (M, N), or (E, M, N) where the target is one of experts.
        """

    def digest(self, target: Target) -> str | None:
        """The digest of the parameter that holds a target's weight, where reading it has taken one."""


class DiskWeightSource:
    """The owner reads its tensors straight from the disk; nothing crosses the wire.

    Args:
        origins: parameter name -> what it is made of in the files.
        expected: digests that the parameters must have, where a run is continued; empty: any.

    `digests` holds those of all parameters that this rank has read, as the model has them: experts that are stored one
    by one are digested as the one parameter that they make.
    """

    def __init__(self, pretrained: PretrainedWeights, origins: dict[str, Origin], expected: dict[str, str]):
        self.pretrained = pretrained
        self.origins = origins
        self.digests: dict[str, str] = {}
        self._expected = expected

    @classmethod
    def of_model(cls, folder: Path, model: PreTrainedModel, expected: dict[str, str]) -> "DiskWeightSource":
        """The weights in a folder for a model whose linears have not been replaced yet.

        Raises:
            ValueError: the files cannot be read, or are not those of this model.
        """
        pretrained = PretrainedWeights(folder)
        return cls(pretrained, pretrained.origins(model), expected)

    def exchange(self, items: list[Item | None]) -> None:
        """Do nothing: what is on the disk needs no exchange."""

    def read(self, item: Item) -> tuple[Tensor, Tensor | None]:
        target = item.target
        if target is None:
            return self.parameter(item.name), None
        return self.weight(target), self.parameter(f"{target.name}.bias") if target.bias else None

    def weight(self, target: Target) -> Tensor:
        """The target's pre-trained weight (M, N) in its dtype on disk, on the CPU; (E, M, N) where it is of experts.

        Raises:
            ValueError: the tensor cannot be read, or its digest is not the expected one.
        """
        return as_matrices(self.parameter(target.weight), target)

    def digest(self, target: Target) -> str | None:
        return self.digests.get(target.weight)

    def parameter(self, name: str) -> Tensor:
        """A pre-trained parameter in the model's shape and its dtype on disk, on the CPU.

        Raises:
            ValueError: the tensor cannot be read, or its digest is not the expected one.
        """
        tensor = self.pretrained.parameter(self.origins[name])
        if name not in self.digests:
            self.digests[name] = digest.of_tensor(tensor)
            if self._expected.get(name, self.digests[name]) != self.digests[name]:
                raise ValueError(
                    f"{self.pretrained.folder}: {name} is not the weight that was trained on: this is another base "
                    f"model, or a damaged copy of it"
                )
        return tensor


class ShardedWeightSource:
    """The weights lie in memory, cut into ZeRO-3 blocks: one all-to-all per round gathers each owner's weight whole.

    Args:
        weights: target name -> the original parameter, whose block is freed as soon as it has been sent.
        device: where the collectives run.
    """

    def __init__(self, weights: dict[str, nn.Parameter], device: torch.device):
        self._weights = weights
        self._device = device
        self._mine: Tensor | None = None

    def exchange(self, items: list[Item | None]) -> None:
        weights: list[Any] = [None if item is None else self._weights.pop(item.name) for item in items]
        blocks = [torch.empty(0) if weight is None else _block(weight) for weight in weights]
        send = torch.cat([block.to(self._device).view(torch.uint8) for block in blocks])
        own = weights[collectives.rank()]
        receive = [0 if own is None else _block(own).nbytes] * collectives.world_size()
        received = collectives.exchange(send, [block.nbytes for block in blocks], receive)
        self._mine = None
        if own is not None:
            self._mine = received.view(_block(own).dtype)[: own.ds_numel].view(own.ds_shape)

    def read(self, item: Item) -> tuple[Tensor, Tensor | None]:
        assert item.target is not None
        assert self._mine is not None
        return as_matrices(self._mine, item.target), None

    def digest(self, target: Target) -> str | None:
        return None


def _block(parameter: Any) -> Tensor:
    """This rank's flat block of a parameter that ZeRO-3 has cut; DeepSpeed adds the attribute at run time."""
    return parameter.ds_tensor.detach()
