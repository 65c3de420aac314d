"""How often Python looks for garbage among the half million objects that PyTorch, transformers and DeepSpeed make."""

import gc

_ALLOCATIONS = 10_000
"""Net allocations of containers between two collections of the youngest; Python's default is 700."""


def collect_garbage_rarely() -> None:
    """Let a command look for garbage less often: what its imports make stays, and need not be looked through.

    At Python's default that takes an eighth of the time until a command begins its work. No memory of a GPU is held
    longer by it: a training step leaves no tensor that only the collector would free (`benchmarks/counts.py` counts).
    """
    gc.set_threshold(_ALLOCATIONS)
