"""The bytes of attention masks that a model makes in a forward pass."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.helpers.live_bytes import tensors_in
from sorsa_ds.train.loss import LossOptions, summed_loss
from sorsa_ds.train.micro_batch import MicroBatch


def mask_bytes(model: nn.Module, micro_batch: MicroBatch, options: LossOptions) -> int:
    """Bytes of every tensor of (..., L, L) numbers that a forward pass makes outside of its attention kernels.

    Args:
        model: it attends by fused kernels (`sdpa`): others make scores of that shape, which count too.
        micro_batch: its length L must be no other size of the model.
    """
    counter = _Squares(micro_batch.input_ids.shape[1])
    with torch.no_grad(), counter:
        summed_loss(model, micro_batch, options)
    return counter.nbytes


class _Squares(TorchDispatchMode):
    """Context that counts the bytes of the storages, made inside, of tensors whose last two sizes are `length`."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.nbytes = 0
        self._length = length

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {one.untyped_storage()._cdata for one in tensors_in((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for one in tensors_in(made):
            if one.shape[-2:] == (self._length, self._length) and one.untyped_storage()._cdata not in given:
                self.nbytes += one.untyped_storage().nbytes()
        return made
