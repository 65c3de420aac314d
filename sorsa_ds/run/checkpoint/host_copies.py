"""Copies of an engine's tensors in host memory, which a GPU makes while training goes on.

    training's stream   step t | forward, backward of t + 1 ......... | wait | optimizer's step of t + 1
    side stream                | masters, moments -> page-locked memory |
    writer's thread            | wait                                   | write the file

Only the optimizer's step changes what is copied, so only that step waits, on the GPU; the training's thread waits the
first time, while the memory is locked. Tensors that lie in host memory already, such as those of an offloaded
optimizer, are copied at once.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_BLOCK = 2**28
"""Bytes that are page-locked at a time: each time is a call of the driver, and is rounded up to a power of two."""

_ALIGNMENT = 64
"""What the places of tensors in a block are multiples of, in bytes."""

Wanted = dict[str, tuple[torch.Size, torch.dtype]]
"""Shape and dtype of each tensor, by its name."""


class HostCopies:
    """Copies tensors to the host, into page-locked buffers that are kept from one time to the next.

    Args:
        optimizer: the optimizer that changes the tensors; its step begins only after copies that are under way.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._wanted: Wanted = {}
        self._buffers: dict[str, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._arrival: torch.cuda.Event | None = None
        optimizer.register_step_pre_hook(self._wait_on_gpu)

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """The tensors in host memory, in fp32 but for whole numbers, and a function that waits until they are there.

        The copies of the time before must not be needed any more: their buffers are used again.
        """
        on_gpu = {name: tensor for name, tensor in tensors.items() if tensor.is_cuda}
        buffers = self._locked(on_gpu)
        copies = {name: buffers[name] if name in on_gpu else _copy(tensor) for name, tensor in tensors.items()}
        if not on_gpu:
            return copies, lambda: None
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for name, tensor in on_gpu.items():
                copies[name].copy_(tensor.detach(), non_blocking=True)
            self._arrival = self._stream.record_event()
        return copies, self._arrival.synchronize

    def _locked(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Page-locked buffers for tensors, the same as before where their shapes are."""
        wanted = {name: (tensor.shape, _kept(tensor)) for name, tensor in tensors.items()}
        if wanted != self._wanted:
            self._wanted, self._buffers = wanted, _page_locked(wanted)
        return self._buffers

    def _wait_on_gpu(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        """Let the optimizer's step begin after the copies, as a pre-hook of it."""
        if self._arrival is not None:
            torch.cuda.current_stream().wait_event(self._arrival)
            self._arrival = None


def _page_locked(wanted: Wanted) -> dict[str, Tensor]:
    """Uninitialised tensors in as few blocks of page-locked memory as `_BLOCK` allows."""
    blocks: list[int] = []
    places = {}
    for name, (shape, dtype) in wanted.items():
        size = shape.numel() * dtype.itemsize
        if not blocks or blocks[-1] + size > _BLOCK:
            blocks.append(0)
        places[name] = len(blocks) - 1, slice(blocks[-1], blocks[-1] + size)
        blocks[-1] += -(-size // _ALIGNMENT) * _ALIGNMENT
    memory = [torch.empty((size,), dtype=torch.uint8, pin_memory=True) for size in blocks]
    return {
        name: memory[block][place].view(wanted[name][1]).view(wanted[name][0])
        for name, (block, place) in places.items()
    }


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", _kept(tensor), copy=True)


def _kept(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.is_floating_point() else tensor.dtype
