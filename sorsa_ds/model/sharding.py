"""How a tensor that its owner holds becomes a parameter on every rank: whole (stages 0 to 2) or cut (ZeRO-3).

Both placements work on one round at a time: at most one item per rank, each of a few tensors whose shapes all know.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sorsa_ds.runtime import collectives


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that is going to be made.

    name: the name of its parameter.
    dtype: the dtype in which the tensor crosses the wire.
    trainable: whether its parameter is trained.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    trainable: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a tensor that a rank gets: its flat numbers from position `start` on."""

    start: int
    values: Tensor


_ALIGNMENT = 16
"""Bytes to which blocks are aligned in a message: enough for every dtype."""


class Placement(Protocol):
    """Distributes the items of a round and turns parts into parameters."""

    def distribute(self, items: list[list[TensorSpec]], mine: list[Tensor]) -> dict[str, Part]:
        """Give every rank its part of every tensor of a round. A collective call.

        Args:
            items: `items[r]` are the tensors that rank r owns in this round.
            mine: this rank's own tensors; the list is emptied, so that each is freed as soon as it is sent.

        Returns:
            this rank's parts by parameter name.
        """

    def parameter(self, spec: TensorSpec, part: Part, dtype: torch.dtype) -> nn.Parameter:
        """Make the parameter of this rank from its part, in a dtype."""


class Whole:
    """Every rank holds every tensor whole, on one device."""

    def __init__(self, device: torch.device):
        self.device = device

    def distribute(self, items: list[list[TensorSpec]], mine: list[Tensor]) -> dict[str, Part]:
        parts = {}
        for owner, specs in enumerate(items):
            for spec in specs:
                if owner == collectives.rank():
                    tensor = mine.pop(0).to(self.device, spec.dtype).contiguous()
                else:
                    tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
                collectives.broadcast(tensor, owner)
                parts[spec.name] = Part(0, tensor.view(-1))
        return parts

    def parameter(self, spec: TensorSpec, part: Part, dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(part.values.view(spec.shape).to(dtype), requires_grad=spec.trainable)


class Zero3:
    """Every rank holds one flat block of each tensor, as a ZeRO-3 parameter.

    A tensor is cut into ceil(numel / world) numbers per rank. With `zero_hpz_partition_size` (ZeRO++'s hpZ) a frozen
    tensor is cut into ceil(numel / size) numbers per rank, so that each node holds it whole and gathers it without the
    other nodes. DeepSpeed alone would cut a frozen tensor twice, among all ranks and once more among those of a node,
    and hold both blocks; the first is never needed here. The factors are cut among all ranks, as their masters are;
    DeepSpeed gathers them between nodes once per step and keeps a second block until the optimizer moves them.

    Args:
        ds_config: the resolved DeepSpeed configuration; it decides where blocks live (offload) and how they persist.
        device: where the model computes.
    """

    def __init__(self, ds_config: dict, device: torch.device):
        from deepspeed.runtime.zero import Init  # imported here, as loading a model whole needs no DeepSpeed

        self.device = device
        self._node_ranks, node = collectives.world_size(), None
        zero = dict(ds_config["zero_optimization"])
        if (size := zero.pop("zero_hpz_partition_size", None)) is not None:
            self._node_ranks, node = size, _node_group(size)
        settings = {"module": nn.Module(), "config_dict_or_path": {**ds_config, "zero_optimization": zero}}
        self._frozen = Init(data_parallel_group=node, **settings)
        self._trained = Init(zero_param_parallel_group=node, **settings)

    def distribute(self, items: list[list[TensorSpec]], mine: list[Tensor]) -> dict[str, Part]:
        world, rank = collectives.world_size(), collectives.rank()
        sizes = [sum(block_bytes(spec, self._blocks(spec)) for spec in specs) for specs in items]
        send = torch.zeros(world * sizes[rank], dtype=torch.uint8, device=self.device)
        position = 0
        for spec in items[rank]:
            blocks = self._blocks(spec)
            _write_blocks(send.view(world, -1)[:, position:], mine.pop(0).to(spec.dtype), blocks)
            position += block_bytes(spec, blocks)
        incoming = collectives.exchange(send, [sizes[rank]] * world, sizes)
        del send
        parts = {}
        position = 0
        for specs in items:
            for spec in specs:
                blocks = self._blocks(spec)
                numel = block_numel(spec, blocks)
                values = incoming[position : position + numel * spec.dtype.itemsize].view(spec.dtype)
                parts[spec.name] = Part(rank % blocks * numel, values)
                position += block_bytes(spec, blocks)
        return parts

    def parameter(self, spec: TensorSpec, part: Part, dtype: torch.dtype) -> nn.Parameter:
        # Untouched memory of the full size, which ZeRO-3 frees at once: DeepSpeed takes the shape from it. Its own way
        # (zero.Init) would broadcast the whole tensor to all ranks.
        empty = torch.empty(spec.shape, dtype=dtype, device=self.device)
        parameter: Any = nn.Parameter(empty, requires_grad=spec.trainable)  # Any: DeepSpeed adds attributes to it
        (self._trained if spec.trainable else self._frozen)._convert_to_deepspeed_param(parameter)
        parameter.partition()
        assert parameter.ds_tensor.numel() == len(part.values), spec
        parameter.ds_tensor.copy_(part.values)
        # DeepSpeed has cut its second block from the untouched memory; the first gathering makes it anew.
        parameter.ds_secondary_tensor = None
        return parameter

    def _blocks(self, spec: TensorSpec) -> int:
        """How many blocks a tensor is cut into; rank d holds block d modulo this number."""
        return collectives.world_size() if spec.trainable else self._node_ranks


def _node_group(size: int) -> torch.distributed.ProcessGroup:
    """The group of `size` consecutive ranks that this rank belongs to, as DeepSpeed groups them for hpZ.

    It is made once per process. A collective call.
    """
    from deepspeed.utils import groups

    if groups._get_zero_param_intra_parallel_group() is None:
        groups._create_zero_param_parallel_group(size)
    group = groups._get_zero_param_intra_parallel_group()
    assert torch.distributed.get_world_size(group) == size, "hpZ has another size already"
    return group


def block_numel(spec: TensorSpec, blocks: int) -> int:
    """How many numbers each block has where a tensor is cut into `blocks` equal flat blocks."""
    return -(-spec.shape.numel() // blocks)


def block_bytes(spec: TensorSpec, blocks: int) -> int:
    """Bytes of one rank's block on the wire, rounded up so that the next block is aligned for any dtype."""
    return -(-block_numel(spec, blocks) * spec.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def _write_blocks(send: Tensor, tensor: Tensor, blocks: int) -> None:
    """Put block d of a tensor at the beginning of every row of `send` (world, bytes) whose number is d modulo `blocks`.

    What a block does not fill stays zero.
    """
    flat = tensor.contiguous().view(-1)
    size = -(-len(flat) // blocks)
    for block, values in enumerate(flat.split(size)):
        send[block::blocks, : values.nbytes] = values.view(torch.uint8)
