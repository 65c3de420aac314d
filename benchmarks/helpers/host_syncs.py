"""How often a computation makes the host wait for the device, counted without one: by the operators that need it."""

from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.helpers.live_bytes import tensors_in

aten = torch.ops.aten
_SIZED_BY_VALUES = {
    aten.nonzero, aten.nonzero_numpy, aten.argwhere, aten.masked_select, aten._unique, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten.bincount,
}  # fmt: skip
_READ = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.item}
_INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class HostSyncs(TorchDispatchMode):
    """Context that counts, by name, what would make the host wait for a GPU: `counts`, and their sum, `total`.

    These are a number or a list that is read, a result whose size depends on values, an index or a mask of booleans,
    whose true places are looked for, and numbers of repetitions that are a tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._lists = _Lists(self.counts)

    @property
    def total(self) -> int:
        """How often the host would have waited."""
        return self.counts.total()

    def __enter__(self) -> "HostSyncs":
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        indexed = packet in _INDEXED and any(index.dtype in (torch.bool, torch.uint8) for index in tensors_in(args[1]))
        repeated = packet is aten.repeat_interleave and (kwargs or {}).get("output_size") is None
        if packet in _SIZED_BY_VALUES or packet in _READ or indexed or repeated:
            self.counts[str(packet)] += 1
        return func(*args, **(kwargs or {}))


class _Lists(TorchFunctionMode):
    """Counts the ways by which a whole tensor is read, which PyTorch does not dispatch on the CPU.

    Through NumPy only a CPU's tensor can be read, for which no GPU is waited.
    """

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.cpu):
            self._counts[f"Tensor.{func.__name__}"] += 1
        return func(*args, **(kwargs or {}))
