"""The few collectives that this project calls itself. Each works without a process group too, as a world of one.

Ranks tell each other numbers and JSON, and nothing pickled: whoever reaches their connections could run code with that.
"""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor

from sorsa_ds.runtime.errors import PeerError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others by default; equal to the default of `train.timeout_minutes`."""


def rank() -> int:
    """The rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def cpu_group(timeout: timedelta) -> dist.ProcessGroup | None:
    """A group of all ranks that communicates between CPUs. A collective call.

    Args:
        timeout: how long a collective of the group may take.

    Returns:
        None, which names the default group, where that one runs over gloo; else a new gloo group.
    """
    beside = world_size() > 1 and dist.get_backend() != "gloo"
    return dist.new_group(backend="gloo", timeout=timeout) if beside else None


def agree(error: Exception | None, device: torch.device | None = None, mark: int | None = None) -> bool:
    """Stop every rank if any rank failed: a failed rank raises its own error, the others raise a PeerError.

    A collective call. Where no rank failed, only one number is communicated, or three where marks are compared.

    Args:
        error: what went wrong on this rank; None if nothing did.
        device: the device over which the ranks tell one another; None: the default group's.
        mark: a number of at most 62 bits that is to be the same on all ranks; on all of them, or on none.

    Returns:
        Whether the marks of all ranks are the same.

    Raises:
        Exception: `error`, on a rank that gave one.
        PeerError: on the other ranks, with the failed ranks and their messages.
    """
    marks: list[int] = []
    if world_size() > 1:
        numbers = [int(error is not None), *([] if mark is None else [mark, -mark])]
        most = torch.tensor(numbers, device=_device() if device is None else device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        failed, *marks = most.tolist()
        if failed:
            messages = gather_json(None if error is None else f"{type(error).__name__}: {error}")
            if error is None:
                failures = {r: m for r, m in enumerate(messages) if m is not None}
                causes = {r: m for r, m in failures.items() if not m.startswith(PeerError.__name__)}
                told = "; ".join(f"rank {r}: {m}" for r, m in (causes or failures).items())
                raise PeerError(f"stopped because another rank failed: {told}")
    if error is not None:
        raise error
    return sum(marks) == 0  # the largest mark is then the smallest one too


@overload
def together(action: Callable[[], T], device: torch.device | None = None) -> T: ...
@overload
def together(action: Callable[[], T], device: torch.device, on: int | None) -> T | None: ...


def together(action: Callable[[], T], device: torch.device | None = None, on: int | None = None) -> T | None:
    """Run an action that may fail, and stop every rank if it failed on any. A collective call.

    Args:
        action: what to run.
        device: the device over which the ranks tell one another; None: the default group's.
        on: the only rank that runs it; None: every rank runs it.

    Returns:
        The action's result; None on a rank that did not run it.

    Raises:
        Exception: the action's own error, on a rank where it failed.
        PeerError: on the other ranks, with the failed ranks and their messages.
    """
    result, error = None, None
    if on is None or rank() == on:
        try:
            result = action()
        except Exception as caught:
            error = caught
    agree(error, device)
    return result


def together_alike(action: Callable[[], tuple[T, int]], device: torch.device) -> tuple[T, bool]:
    """Run an action that may fail and that should give the same on every rank. A collective call.

    Args:
        action: gives a result and the number, of at most 62 bits, by which it is compared.

    Returns:
        The action's result, and whether its number is the same on all ranks.

    Raises:
        Exception: the action's own error, on a rank where it failed.
        PeerError: on the other ranks, with the failed ranks and their messages.
    """
    error = None
    try:
        result, mark = action()
    except Exception as caught:
        error, mark = caught, 0
    alike = agree(error, device, mark)
    return result, alike


def on_rank_0(action: Callable[[], T], device: torch.device) -> T:
    """What an action gives on rank 0, which alone runs it, on every rank. A collective call.

    Args:
        action: gives something small that JSON can hold.

    Raises:
        Exception: the action's own error, on rank 0.
        PeerError: on the other ranks, with rank 0's message.
    """
    result = together(action, device, on=0)
    [given] = gather_lists([result] if rank() == 0 else [])
    return given


def total(value: float | Tensor, device: torch.device) -> Tensor:
    """The sum of a number over all ranks, as a 0-D float64 tensor on the device. A collective call."""
    number = torch.as_tensor(value, device=device).detach().double()
    if world_size() > 1:
        number = number.clone()
        dist.all_reduce(number)
    return number


def sum_over_ranks(tensors: list[Tensor]) -> None:
    """Overwrite each tensor with its sum over the ranks, in one all-reduce. All have one dtype. A collective call."""
    if world_size() > 1:
        message = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(message)
        for tensor, values in zip(tensors, message.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(values.view(tensor.shape))


def exchange(send: Tensor, send_bytes: list[int], receive_bytes: list[int]) -> Tensor:
    """Send bytes to every rank and receive bytes from every rank (all-to-all). A collective call.

    Args:
        send: 1-D uint8; first the bytes for rank 0, then those for rank 1, and so on.
        send_bytes: how many bytes go to each rank.
        receive_bytes: how many bytes come from each rank.

    Returns:
        1-D uint8; first the bytes from rank 0, then those from rank 1, and so on.
    """
    if world_size() == 1:
        return send
    incoming = torch.empty(sum(receive_bytes), dtype=torch.uint8, device=send.device)
    dist.all_to_all_single(incoming, send, receive_bytes, send_bytes)
    return incoming


def gather_json(mine: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What every rank has to tell, in rank order; the same on every rank. A collective call.

    Args:
        mine: a small value that JSON knows. Tuples come back as lists.
        group: a process group of all ranks; None: the default group.

    Raises:
        TypeError: `mine` is not such a value; on this rank alone.
    """
    told = json.dumps(mine).encode()
    if world_size() == 1:
        return [json.loads(told)]
    device = _device(group)
    size = torch.tensor([len(told)], device=device)
    sizes = [torch.empty_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size, group=group)
    longest = max(int(one) for one in sizes)
    padded = torch.frombuffer(bytearray(told.ljust(longest)), dtype=torch.uint8).to(device)
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded, group=group)
    return [json.loads(one.cpu().numpy().tobytes()) for one in received]


def gather_lists(mine: list) -> list:
    """All ranks' lists of small values, as `gather_json` takes them, joined in rank order. A collective call."""
    return [entry for part in gather_json(mine) for entry in part]


def broadcast(tensor: Tensor, source: int) -> None:
    """Overwrite a tensor with the one that rank `source` has. A collective call."""
    if world_size() > 1:
        dist.broadcast(tensor, source)


def _device(group: dist.ProcessGroup | None = None) -> torch.device:
    """Where a group takes its tensors from."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
