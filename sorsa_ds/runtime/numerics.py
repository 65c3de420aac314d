"""How numbers are rounded and drawn on this machine: TF32, sums of bf16 products, deterministic kernels, random seeds.

Every switch of PyTorch that changes results is set here, once, and the run prints how they stand.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sorsa_ds.runtime.precision import Device

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def set_numerics(device: Device, *, deterministic: bool = False) -> str:
    """Set all switches for this process, before it has computed anything; returns a sentence that says how they stand.

    A GPU may round the inputs of fp32 products to TF32 (`full_fp32_products` forbids it where it would hurt). It sums
    bf16 products in fp32, also where it splits a sum among several blocks, which PyTorch by itself may do in bf16.

    Args:
        deterministic: take only kernels that give the same bits each time. An operation that has none is an error.
    """
    torch.use_deterministic_algorithms(deterministic)
    # Filling memory that nobody reads helps to find faults, and takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    kernels = "deterministic kernels only" if deterministic else "the fastest kernels, deterministic or not"
    if device == "cpu":
        return f"Numerics: full fp32 products, {kernels}."
    if deterministic:
        os.environ.setdefault(_WORKSPACE, ":4096:8")  # cuBLAS asks for it when it starts
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = False
    return f"Numerics: fp32 products in TF32 but where it matters, bf16 products summed in fp32, {kernels}."


@contextmanager
def full_fp32_products() -> Iterator[None]:
    """A context in which the inputs of fp32 matrix products are not rounded to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def seed_rank(seed: int, rank: int) -> None:
    """Seed what this rank draws by itself, which is dropout: other masks on every rank, the same in every run."""
    torch.manual_seed(seed + rank)
