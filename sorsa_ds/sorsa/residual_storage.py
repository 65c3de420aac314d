"""How the frozen residual W_r is stored: as a matrix, or packed into 4 or 8 bits per weight (`packed_storage`).

Shapes, used as suffixes of tensor names: W_r (M, N); T tokens; M out_features, N in_features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sorsa_ds.config.method_settings import ResidualConfig
from sorsa_ds.runtime.precision import Precision
from sorsa_ds.sorsa.packed_storage import CODES, Int8, Layout, Nf4, Nf4Double


class Storage(Protocol):
    """One way to store a matrix. It is immutable and without state: all numbers are in the tensors that it makes."""

    @property
    def names(self) -> Sequence[str]:
        """The names of the tensors, in the order in which `pack` returns and `dense` takes them."""

    @property
    def quantised(self) -> bool:
        """Whether the storage has fewer than 16 bits per weight."""

    def tensors(self, shape: torch.Size) -> Layout:
        """Shape and dtype of each tensor of a matrix (M, N), by name."""

    def pack(self, matrix: Tensor) -> list[Tensor]:
        """The tensors of an fp32 matrix (M, N), on its device."""

    def dense(self, tensors: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The matrix (M, N) that the tensors stand for, in a dtype."""

    def linear(self, tensors: Sequence[Tensor], x_TN: Tensor, out_features: int, bias_M: Tensor | None) -> Tensor:
        """x W_r^T + bias, (T, M) in the dtype of x, without a gradient."""

    def joins(self, numel: int) -> bool:
        """Whether tensors of matrices of `numel` numbers, one after the other, are those of the joined matrix."""


@dataclass(frozen=True, slots=True)
class Dense:
    """Stores the matrix itself, in a dtype."""

    dtype: torch.dtype
    names = (CODES,)
    quantised = False

    def tensors(self, shape: torch.Size) -> Layout:
        return {CODES: (shape, self.dtype)}

    def pack(self, matrix: Tensor) -> list[Tensor]:
        return [matrix.to(self.dtype)]

    def dense(self, tensors: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return tensors[0].to(dtype)

    def linear(self, tensors: Sequence[Tensor], x_TN: Tensor, out_features: int, bias_M: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x_TN, tensors[0].to(x_TN.dtype), bias_M)

    def joins(self, numel: int) -> bool:
        return True


def stored_bytes(storage: Storage, shape: torch.Size) -> int:
    """The bytes of all tensors of a matrix (M, N)."""
    return sum(part.numel() * dtype.itemsize for part, dtype in storage.tensors(shape).values())


_QUANTISED: dict[str, type[Nf4 | Nf4Double | Int8]] = {"nf4": Nf4, "nf4_double": Nf4Double, "int8": Int8}
_DENSE: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolve_residual(config: ResidualConfig, precision: Precision) -> ResidualConfig:
    """The settings of the residual, with the storage `auto` replaced by the dtype that the precision has for W_r."""
    if config.storage != "auto":
        return config
    return replace(config, storage="fp32" if precision.residual_dtype == torch.float32 else "bf16")


def describe_storage(config: ResidualConfig) -> str:
    """The settings of the residual in a few words, for tables and messages."""
    if config.storage not in _QUANTISED:
        return config.storage
    rounds = f", {config.iterations} rounds" if config.iterations > 1 else ""
    return f"{config.storage}, blocks of {config.block_size}{rounds}"


def storage_of(config: ResidualConfig, precision: Precision) -> Storage:
    """The storage that the settings of the residual mean.

    Raises:
        ValueError: the storage cannot be used with the precision.
    """
    name = resolve_residual(config, precision).storage
    if name in _QUANTISED:
        return _QUANTISED[name](config.block_size)
    if name == "fp32" and precision.name == "bf16":
        raise ValueError(
            "residual.storage: fp32 does not go with precision bf16, whose engine rounds the model; use mixed"
        )
    return Dense(_DENSE[name])


def resolve_storage(config: ResidualConfig, precision: Precision, device: torch.device) -> Storage:
    """The storage that the settings of the residual mean. A quantised one is tried out on the device.

    Raises:
        ValueError: the storage does not go with the precision, or does not work on the device.
    """
    storage, name = storage_of(config, precision), config.storage
    if not storage.quantised:
        return storage
    ramp = torch.linspace(-1, 1, 4 * config.block_size, device=device).view(4, -1)
    try:
        lost = (
            (storage.dense(storage.pack(ramp), (4, config.block_size), precision.compute_dtype) - ramp)
            .abs()
            .max()
            .item()
        )
    except Exception as error:  # a library without a kernel for this device may raise anything
        raise ValueError(f"residual.storage: {name} does not work on {device}: {error}") from error
    if not lost < 0.2:
        raise ValueError(f"residual.storage: {name} gives wrong numbers on {device} (off by {lost:.2g} of 1)")
    return storage
