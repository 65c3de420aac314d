"""Floating-point operations of matrix products, counted where PyTorch dispatches them, and how fast a device is."""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.helpers.turns import synchronise


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter, taught what it does not know: the `addmm_` of our layer, products of rows with the matrices of
    their experts, and attention on a CPU.

    Attention counts as the whole square, of which a causal kernel may leave half out.
    """
    aten = torch.ops.aten
    known = {
        aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1],
        aten._grouped_mm: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[-1],
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda y, q, k, v, *_, **__: (
            sdpa_backward_flop_count(y, q, k, v)
        ),
    }
    return FlopCounterMode(display=False, custom_mapping=known)


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """flop/s of a device in products of large square matrices: the best of five measurements.

    dtype: the dtype of both matrices. On a GPU a measurement is of 50 products, long enough for the clock.
    """
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
