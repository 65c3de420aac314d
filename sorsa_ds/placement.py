"""How a tensor that its owner holds becomes a parameter on every rank: whole (stages 0 to 2) or cut (ZeRO-3).

Both placements work on a round: at most one item a rank, each item a few tensors whose shapes all ranks know.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from sorsa_ds import comm


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be: its parameter's name, its shape, and the dtype in which it crosses the wire."""

    name: str
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank gets of a tensor: flat numbers from position `start`."""

    start: int
    values: Tensor


_ALIGNMENT = 16


class Placement(Protocol):
    """Distributes the items of a round and turns parts into parameters."""

    def distribute(self, items: list[list[TensorSpec]], mine: list[Tensor]) -> dict[str, Part]:
        """`items[r]`: what rank r owns in this round; `mine`: this rank's tensors, which are used up. A collective
        call."""

    def parameter(self, spec: TensorSpec, part: Part, dtype: torch.dtype, trainable: bool) -> nn.Parameter:
        """The parameter of this rank, made from its part."""


class Whole:
    """Every rank holds every tensor whole, on one device."""

    def __init__(self, device: torch.device):
        self.device = device

    def distribute(self, items: list[list[TensorSpec]], mine: list[Tensor]) -> dict[str, Part]:
        parts = {}
        for owner, specs in enumerate(items):
            for spec in specs:
                if owner == comm.rank():
                    tensor = mine.pop(0).to(self.device, spec.dtype).contiguous()
                else:
                    tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
                comm.broadcast(tensor, owner)
                parts[spec.name] = Part(0, tensor.view(-1))
        return parts

    def parameter(self, spec: TensorSpec, part: Part, dtype: torch.dtype, trainable: bool) -> nn.Parameter:
        return nn.Parameter(part.values.view(spec.shape).to(dtype), requires_grad=trainable)


class Zero3:
    """Every rank holds one flat block of ceil(numel / world) numbers of each tensor, as a ZeRO-3 parameter.

    Args:
        ds_config: the resolved DeepSpeed configuration; it decides where blocks live (offload) and how they persist.
        device: where the model computes.
    """

    def __init__(self, ds_config: dict, device: torch.device):
        from deepspeed.runtime.zero import Init  # the library's other rooms need no DeepSpeed

        self.device = device
        self._init = Init(module=nn.Module(), config_dict_or_path=ds_config)

    def distribute(self, items: list[list[TensorSpec]], mine: list[Tensor]) -> dict[str, Part]:
        world, rank = comm.world_size(), comm.rank()
        sizes = [sum(block_bytes(spec, world) for spec in specs) for specs in items]
        send = torch.zeros(world * sizes[rank], dtype=torch.uint8, device=self.device)
        position = 0
        for spec in items[rank]:
            _write_blocks(send.view(world, -1)[:, position:], mine.pop(0).to(spec.dtype), world)
            position += block_bytes(spec, world)
        incoming = comm.exchange(send, [sizes[rank]] * world, sizes)
        del send
        parts = {}
        position = 0
        for specs in items:
            for spec in specs:
                numel = block_numel(spec, world)
                values = incoming[position : position + numel * spec.dtype.itemsize].view(spec.dtype)
                parts[spec.name] = Part(rank * numel, values)
                position += block_bytes(spec, world)
        return parts

    def parameter(self, spec: TensorSpec, part: Part, dtype: torch.dtype, trainable: bool) -> nn.Parameter:
        # Untouched memory of the full size, which ZeRO-3 frees at once: DeepSpeed takes the shape from it. Its own way
        # (zero.Init) would broadcast the whole tensor to all ranks.
        parameter = nn.Parameter(torch.empty(spec.shape, dtype=dtype, device=self.device), requires_grad=trainable)
        self._init._convert_to_deepspeed_param(parameter)
        parameter.partition()
        assert parameter.ds_tensor.numel() == len(part.values), spec
        parameter.ds_tensor.copy_(part.values)
        return parameter


def block_numel(spec: TensorSpec, world: int) -> int:
    """Numbers in one of the `world` equal flat blocks of a tensor."""
    return -(-spec.shape.numel() // world)


def block_bytes(spec: TensorSpec, world: int) -> int:
    """Bytes of one rank's block on the wire, rounded up so that the next block is aligned for any dtype."""
    return -(-block_numel(spec, world) * spec.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def _write_blocks(send: Tensor, tensor: Tensor, world: int) -> None:
    """Put block d of a tensor at the beginning of row d of `send` (world, bytes); what it does not fill stays zero."""
    flat = tensor.contiguous().view(-1)
    size = -(-len(flat) // world)
    for rank, values in enumerate(flat.split(size)):
        send[rank, : values.nbytes] = values.view(torch.uint8)
