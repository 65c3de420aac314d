"""Memory of one of several sides in a process: what a side holds between its steps, and what a step adds to that.

On a GPU both are the allocator's figures. On a CPU they are counted, tensor by tensor, because resident memory says as
much about the allocator as about the side.
"""

import contextlib
import gc
from collections.abc import Iterator

import torch

from benchmarks.helpers.live_bytes import LiveBytes


def held_bytes() -> int:
    """Bytes of all tensors that are alive in this process, whichever side they belong to."""
    gc.collect()
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    storages = {}
    for tensor in (known for known in gc.get_objects() if issubclass(type(known), torch.Tensor)):
        for one in (tensor, tensor.grad if tensor.is_leaf else None):
            if one is not None and one.device.type == "cpu" and one.layout == torch.strided:
                storages[one.untyped_storage()._cdata] = one.untyped_storage().nbytes()
    return sum(storages.values())


class Made:
    """`nbytes`: the most bytes of tensors alive at one time in a step, those from before the step left out."""

    nbytes = 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is made inside this context, which is entered on the thread that takes the step."""
        if torch.cuda.is_available():
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            yield
            self.nbytes = torch.cuda.max_memory_allocated() - before
        else:
            with LiveBytes() as live:
                yield
            self.nbytes = live.peak
