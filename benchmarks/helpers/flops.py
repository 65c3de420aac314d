"""Flops of products, as PyTorch dispatches them, and the speed at which a device makes the largest ones."""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.helpers.turns import synchronise


def flop_counter() -> FlopCounterMode:
    """A counter that knows what PyTorch's own passes over: the `addmm_` of our layer, and attention on a CPU.

    Attention counts as the whole square: a causal kernel may leave half of it out.
    """

    aten = torch.ops.aten
    known = {
        aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1],
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda y, q, k, v, *_, **__: (
            sdpa_backward_flop_count(y, q, k, v)
        ),
    }
    return FlopCounterMode(display=False, custom_mapping=known)


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """flop/s of a product of square matrices that are large for the device: the best of a few, each long enough for a
    clock."""
    size, repeats = (8192, 50) if device.type == "cuda" else (2048, 1)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        synchronise()
        began = time.perf_counter()
        for _ in range(repeats):
            a @ b
        synchronise()
        seconds.append((time.perf_counter() - began) / repeats)
    return 2 * size**3 / min(seconds)
