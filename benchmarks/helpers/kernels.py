"""Kernels and host syncs, counted exactly where PyTorch dispatches its operators: on a CPU as on a GPU."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NAMES = """
    _local_scalar_dense _nested_tensor_size _reshape_alias _unsafe_view alias as_strided detach diagonal empty
    empty_like empty_strided expand lift_fresh new_empty new_empty_strided permute promote_types select slice split
    split_with_sizes squeeze t transpose unbind unsqueeze view view_as_real _conj unfold is_same_size
"""
WITHOUT_KERNEL = frozenset(_NAMES.split())
"""Operators that make a view, allocate, or ask for a fact: nothing is launched for them."""

SYNCS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim"})
"""Operators for which the host waits until the device has come to their numbers."""


class Dispatched(TorchDispatchMode):
    """Context that counts what is dispatched inside it, backward passes included.

    kernels: how often each operator that launches a kernel was called, by name. An operator of a library, such as
        attention, counts once.
    syncs: how often the host would wait for a device, by operator. Indexing with a mask counts, because its result has
        as many rows as the mask has ones. What is read of a CPU's tensor through NumPy does not: it cannot be a GPU's.
    """

    def __init__(self):
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in WITHOUT_KERNEL:
            self.kernels[name] += 1
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1])
        )
        if name in SYNCS or by_mask:
            self.syncs[name] += 1
        return func(*args, **(kwargs or {}))
