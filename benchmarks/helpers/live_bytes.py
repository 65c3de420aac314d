"""The most bytes of tensors that are alive at one time, counted exactly, where PyTorch dispatches its operators."""

import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Context that counts the bytes of tensors made inside it, gradients included: `now`, and their `peak`.

    What a kernel allocates for itself and frees again is not seen. Tensors on the meta device take nothing.

    Args:
        counted: whether a tensor is counted; unset: every tensor is.
    """

    def __init__(self, counted: Callable[[torch.Tensor], bool] = lambda tensor: True):
        super().__init__()
        self._counted = counted
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tensors_in((args, kwargs)):  # tensors from before are noted, so that they are not counted
            self._note(tensor.untyped_storage(), 0)
        made = func(*args, **(kwargs or {}))
        for tensor in tensors_in(made):
            nothing = tensor.is_meta or not self._counted(tensor)
            self._note(tensor.untyped_storage(), 0 if nothing else tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def _note(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.now += nbytes
            weakref.finalize(storage, self._gone, storage._cdata, nbytes)

    def _gone(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes


def tensors_in(tree) -> list[torch.Tensor]:
    """The tensors among the arguments or results of an operator."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
