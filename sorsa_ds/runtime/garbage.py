"""How often Python looks for garbage among the half million objects that PyTorch, transformers and DeepSpeed make."""

import gc

_ALLOCATIONS = 10_000
"""Net allocations of containers between two collections of the youngest; Python's default is 700."""


def collect_garbage_rarely() -> None:
    """Let a command look for garbage less often: what its imports make stays, and need not be looked through.

    At Python's default that takes an eighth of the time until a command begins its work. No memory of a GPU is held
    longer by it: the training steps that `benchmarks/counts.py` counts, on ZeRO stages 0, 2 and 3, leave no tensor that
    only the collector would free.
    """
    gc.set_threshold(_ALLOCATIONS)
