"""The few collectives that this project makes itself; each works without a process group too, as a world of one."""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others where nothing else is said: that of `train.timeout_minutes`."""


class PeerError(RuntimeError):
    """Another rank failed; its own message has been, or is being, printed there."""


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def cpu_group(timeout: timedelta) -> dist.ProcessGroup | None:
    """A group of all ranks that talks through the CPUs: the default one, named None, where it does. A collective call.

    timeout: of a new group's collectives.
    """
    beside = world_size() > 1 and dist.get_backend() != "gloo"
    return dist.new_group(backend="gloo", timeout=timeout) if beside else None


def agree(error: Exception | None, device: torch.device) -> None:
    """Stop on every rank if any rank failed: the failed rank raises its own error, the others name it.

    A collective call. One number crosses the wire where all is well.

    Raises:
        the given error, or PeerError with the failed ranks and their messages.
    """
    if world_size() > 1:
        failed = torch.tensor(float(error is not None), device=device)
        dist.all_reduce(failed)
        if failed.item():
            messages: list = [None] * world_size()
            dist.all_gather_object(messages, None if error is None else f"{type(error).__name__}: {error}")
            if error is None:
                told = "; ".join(f"rank {r}: {m}" for r, m in enumerate(messages) if m is not None)
                raise PeerError(f"stopped because another rank failed: {told}")
    if error is not None:
        raise error


@overload
def together(action: Callable[[], T], device: torch.device) -> T: ...
@overload
def together(action: Callable[[], T], device: torch.device, on: int | None) -> T | None: ...


def together(action: Callable[[], T], device: torch.device, on: int | None = None) -> T | None:
    """Do something that may fail on every rank, or on rank `on` alone, and stop on all of them where it failed.

    A collective call. Returns the action's result, None on a rank that had nothing to do.

    Raises:
        as `agree`.
    """
    result, error = None, None
    if on is None or rank() == on:
        try:
            result = action()
        except Exception as caught:
            error = caught
    agree(error, device)
    return result


def total(value: float | Tensor, device: torch.device) -> Tensor:
    """Sum of a number over all ranks, 0-D float64 on the device. A collective call."""
    number = torch.as_tensor(value, device=device).detach().double()
    if world_size() > 1:
        number = number.clone()
        dist.all_reduce(number)
    return number


def sum_over_ranks(tensors: list[Tensor]) -> None:
    """Overwrite each tensor with its sum over the ranks; all are of one dtype. A collective call, in one message."""
    if world_size() > 1:
        message = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(message)
        for tensor, values in zip(tensors, message.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(values.view(tensor.shape))


def exchange(send: Tensor, send_bytes: list[int], receive_bytes: list[int]) -> Tensor:
    """All-to-all of byte strings, laid end to end in rank order; returns what the ranks sent here, laid out alike.

    send: 1-D uint8, `send_bytes[d]` of them for rank d. A collective call.
    """
    if world_size() == 1:
        return send
    incoming = torch.empty(sum(receive_bytes), dtype=torch.uint8, device=send.device)
    dist.all_to_all_single(incoming, send, receive_bytes, send_bytes)
    return incoming


def gather_lists(mine: list) -> list:
    """The ranks' lists of small objects, joined in rank order, on every rank. A collective call."""
    if world_size() == 1:
        return mine
    lists: list = [None] * world_size()
    dist.all_gather_object(lists, mine)
    return [entry for part in lists for entry in part]


def broadcast(tensor: Tensor, source: int) -> None:
    """Overwrite a tensor with rank `source`'s. A collective call."""
    if world_size() > 1:
        dist.broadcast(tensor, source)
