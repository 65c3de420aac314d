"""What ranks send one another: every collective of this process, seen where PyTorch dispatches it."""

from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective operation.

    kind: PyTorch's name of the operation.
    ranks: the ranks that take part.
    nbytes: bytes of the whole tensor, which all ranks receive, or give, together.
    dtype: the dtype of the tensor's numbers.
    """

    kind: str
    ranks: tuple[int, ...]
    nbytes: int
    dtype: torch.dtype


class Wire(TorchDispatchMode):
    """Context that notes the collectives of this rank in `seen`, but for those of a group of one rank."""

    def __init__(self):
        super().__init__()
        self.seen: list[Collective] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "_c10d_functional" and func._opname != "wait_tensor":
            raise NotImplementedError(f"{func} is not counted")
        if func.namespace == "c10d" and func._opname not in ("barrier", "monitored_barrier_"):
            group = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
            ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))
            if len(ranks) > 1:
                tensors = _whole(func._opname, args)
                nbytes = sum(tensor.nbytes for tensor in tensors)
                self.seen.append(Collective(func._opname, ranks, nbytes, tensors[0].dtype))
        return func(*args, **(kwargs or {}))

    def ranks(self) -> set[tuple[int, ...]]:
        """The groups that took part in a collective."""
        return {one.ranks for one in self.seen}

    def bytes_by_kind(self, ranks: int) -> dict[str, int]:
        """Bytes by kind, of the collectives in which `ranks` ranks take part."""
        counted: Counter = Counter()
        for one in self.seen:
            if len(one.ranks) == ranks:
                counted[one.kind] += one.nbytes
        return dict(counted)


def _whole(kind: str, args: tuple) -> list[torch.Tensor]:
    """The tensors of a collective that are as large as what all ranks receive, or give, together."""
    if kind == "_allgather_base_":
        return [args[0]]
    if kind == "_reduce_scatter_base_":
        return [args[1]]
    if kind in ("allreduce_", "reduce_", "broadcast_"):
        return list(args[0])
    raise NotImplementedError(f"{kind} is not counted")
