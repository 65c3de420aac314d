"""Copies of an engine's tensors in host memory, which a GPU makes while training goes on.

    training's stream   step t | forward, backward of t + 1 ......... | wait | optimizer's step of t + 1
    side stream                | masters, moments -> page-locked memory |
    writer's thread            | wait                                   | write the file

Only the optimizer's step changes what is copied, so only that step waits, on the GPU; the training's thread never does.
Tensors that lie in host memory already, such as those of an offloaded optimizer, are copied at once.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class HostCopies:
    """Copies tensors to the host, into page-locked buffers that are kept from one time to the next.

    Args:
        optimizer: whose step changes the tensors.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._buffers: dict[str, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._arrival: torch.cuda.Event | None = None
        optimizer.register_step_pre_hook(self._wait_on_gpu)

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """The tensors in host memory, in fp32 but for whole numbers, and a function that waits until they are there.

        The copies of the time before must not be needed any more: their buffers are used again.
        """
        copies, on_gpu = {}, {}
        for name, tensor in tensors.items():
            if tensor.is_cuda:
                on_gpu[name] = tensor
            copies[name] = self._buffer(name, tensor) if tensor.is_cuda else _copy(tensor)
        if not on_gpu:
            return copies, lambda: None
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for name, tensor in on_gpu.items():
                copies[name].copy_(tensor.detach(), non_blocking=True)
            self._arrival = self._stream.record_event()
        return copies, self._arrival.synchronize

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        held = self._buffers.get(name)
        if held is None or held.shape != tensor.shape:
            held = self._buffers[name] = torch.empty(tensor.shape, dtype=_kept(tensor), pin_memory=True)
        return held

    def _wait_on_gpu(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        """Let the optimizer's step begin after the copies, as a pre-hook of it."""
        if self._arrival is not None:
            torch.cuda.current_stream().wait_event(self._arrival)
            self._arrival = None


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", _kept(tensor), copy=True)


def _kept(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.is_floating_point() else tensor.dtype
