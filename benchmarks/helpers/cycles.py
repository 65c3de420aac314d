"""Counts the tensors that a computation leaves to Python's garbage collector, instead of freeing them at once."""

import gc
from collections.abc import Callable

import torch


def cyclic_tensors(compute: Callable[[], object]) -> int:
    """Number of tensors that are unreachable after `compute`, and that only the collector finds."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        compute()
        gc.collect()
        return sum(issubclass(type(found), torch.Tensor) for found in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        if enabled:
            gc.enable()
