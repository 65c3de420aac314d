"""How the frozen residual W_r is kept: as it is, or packed into 4 or 8 bits a number by bitsandbytes.

All packed tensors are uint8, the fp32 scales as their bytes: an engine that casts a model's numbers to bf16 leaves them
alone, and ZeRO-3 cuts and gathers them like any parameter.

Shapes: W_r (M, N). Its numbers in row-major order are cut into blocks of `block_size`, the last one filled with zeros.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sorsa_ds.config.schema import ResidualConfig
from sorsa_ds.runtime.precision import Precision

CODES, SCALES, RANGE = "residual", "residual_scales", "residual_scales_range"
"""Names of a layer's frozen tensors; what is not packed has the first alone."""

_CHUNK = 2**20
"""Numbers that are quantised at once: bitsandbytes takes many times their memory meanwhile on a CPU."""

_SCALES_BLOCK = 256
"""Scales that share a scale of their own; fixed in bitsandbytes."""

_DIRECT = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that bitsandbytes computes in."""

Layout = dict[str, tuple[torch.Size, torch.dtype]]


class Storage(Protocol):
    """One way to keep a matrix. Immutable, and without any state: all numbers are in the tensors that it makes."""

    @property
    def names(self) -> Sequence[str]:
        """Of the tensors, in the order in which `pack` gives and `dense` takes them."""

    @property
    def quantised(self) -> bool:
        """Whether it loses more than a rounding to 16 bits."""

    def tensors(self, shape: torch.Size) -> Layout:
        """Shape and dtype of each tensor of a matrix (M, N), by name."""

    def pack(self, matrix: Tensor) -> list[Tensor]:
        """The tensors of an fp32 matrix (M, N), on its device."""

    def dense(self, tensors: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The matrix (M, N) that they stand for."""

    def linear(self, tensors: Sequence[Tensor], x_TN: Tensor, out_features: int, bias_M: Tensor | None) -> Tensor:
        """x W_r^T + bias, (T, M) in the dtype of x, without a gradient."""


class _MadeDense:
    """A product that makes the matrix dense for a moment."""

    __slots__ = ()

    def linear(self, tensors: Sequence[Tensor], x_TN: Tensor, out_features: int, bias_M: Tensor | None) -> Tensor:
        matrix_MN = self.dense(tensors, (out_features, x_TN.shape[-1]), x_TN.dtype)
        return torch.nn.functional.linear(x_TN, matrix_MN, bias_M)


@dataclass(frozen=True, slots=True)
class Dense(_MadeDense):
    """The matrix itself in a dtype."""

    dtype: torch.dtype
    names = (CODES,)
    quantised = False

    def tensors(self, shape: torch.Size) -> Layout:
        return {CODES: (shape, self.dtype)}

    def pack(self, matrix: Tensor) -> list[Tensor]:
        return [matrix.to(self.dtype)]

    def dense(self, tensors: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return tensors[0].to(dtype)


@dataclass(frozen=True, slots=True)
class Int8(_MadeDense):
    """8 bits a number, evenly spaced between plus and minus its block's largest, and an fp32 scale (that number).

    (bitsandbytes' own map, finer near zero, loses 1.6 times as much of normally distributed weights.)
    """

    block_size: int
    names = (CODES, SCALES)
    quantised = True

    def tensors(self, shape: torch.Size) -> Layout:
        blocks = _blocks(shape, self.block_size)
        return {CODES: _bytes(blocks * self.block_size), SCALES: _bytes(4 * blocks)}

    def pack(self, matrix: Tensor) -> list[Tensor]:
        code = _even_code(matrix.device)
        made = [
            _functional().quantize_blockwise(part, code=code, blocksize=self.block_size)
            for part in _parts(matrix, self.block_size)
        ]
        return [torch.cat([codes for codes, _ in made]), _as_bytes(torch.cat([state.absmax for _, state in made]))]

    def dense(self, tensors: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        codes, scales = tensors
        state = _functional().QuantState(
            absmax=_as_numbers(scales), code=_even_code(codes.device), blocksize=self.block_size, dtype=_direct(dtype)
        )
        return _matrix(_functional().dequantize_blockwise(codes, state), shape, dtype)


class _FourBit(_MadeDense):
    """What 4-bit codes have in common, however their scales are kept."""

    __slots__ = ()

    def dense(self, tensors: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        codes, scales = tensors[0], self._scales(tensors)
        padded = torch.Size((2 * codes.numel(),))
        state = _functional().QuantState(
            absmax=scales, shape=padded, blocksize=self.block_size, quant_type="nf4", dtype=_direct(dtype)
        )
        return _matrix(_functional().dequantize_4bit(codes.view(-1, 1), state), shape, dtype)

    def linear(self, tensors: Sequence[Tensor], x_TN: Tensor, out_features: int, bias_M: Tensor | None) -> Tensor:
        """By bitsandbytes' product: a fused kernel for as few tokens as that is faster on the device, else as above."""
        # A block must not cross two rows of the matrix.
        if x_TN.dtype not in _DIRECT or x_TN.shape[-1] % self.block_size or not len(x_TN):
            return super().linear(tensors, x_TN, out_features, bias_M)
        codes, shape = tensors[0], (out_features, x_TN.shape[-1])
        # The kernel reads 16 bytes at once, and ZeRO-3 may have gathered the codes at any position of a larger buffer.
        aligned = codes if codes.data_ptr() % 16 == 0 else codes.clone()
        scales, *of_scales = self._scaling(tensors)
        return _ops().gemm_4bit(
            x_TN,
            aligned.view(-1, 1),
            shape,
            scales,
            self.block_size,
            "nf4",
            bias_M,
            *of_scales,
        )


@dataclass(frozen=True, slots=True)
class Nf4(_FourBit):
    """4 bits a number (QLoRA's NF4: quantiles of the normal distribution), and an fp32 scale a block."""

    block_size: int
    names = (CODES, SCALES)
    quantised = True

    def tensors(self, shape: torch.Size) -> Layout:
        blocks = _blocks(shape, self.block_size)
        return {CODES: _bytes(blocks * self.block_size // 2), SCALES: _bytes(4 * blocks)}

    def pack(self, matrix: Tensor) -> list[Tensor]:
        codes, scales = _to_nf4(matrix, self.block_size)
        return [codes, _as_bytes(scales)]

    def _scales(self, tensors: Sequence[Tensor]) -> Tensor:
        return _as_numbers(tensors[1])

    def _scaling(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (self._scales(tensors),)


@dataclass(frozen=True, slots=True)
class Nf4Double(_FourBit):
    """The same with the scales in 8 bits: their mean in fp32, and 256 differences from it to an fp32 scale."""

    block_size: int
    names = (CODES, SCALES, RANGE)
    quantised = True

    def tensors(self, shape: torch.Size) -> Layout:
        blocks = _blocks(shape, self.block_size)
        codes = _bytes(blocks * self.block_size // 2)
        return {CODES: codes, SCALES: _bytes(blocks), RANGE: _bytes(4 * (1 - -blocks // _SCALES_BLOCK))}

    def pack(self, matrix: Tensor) -> list[Tensor]:
        codes, scales = _to_nf4(matrix, self.block_size)
        mean = scales.mean()
        differences, state = _functional().quantize_blockwise(
            scales - mean, code=_dynamic_code(scales.device), blocksize=_SCALES_BLOCK
        )
        return [codes, differences, _as_bytes(torch.cat([mean.view(1), state.absmax]))]

    def _scales(self, tensors: Sequence[Tensor]) -> Tensor:
        absmax, differences, code, mean = self._scaling(tensors)
        return _functional().dequantize_blockwise(differences, absmax=absmax, code=code, blocksize=_SCALES_BLOCK) + mean

    def _scaling(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What bitsandbytes takes for doubly quantised scales: their own scales, codes, the codes' map, the mean."""
        _, differences, span = tensors
        numbers = _as_numbers(span)
        return numbers[1:], differences, _dynamic_code(span.device), numbers[0]


_QUANTISED = {"nf4": Nf4, "nf4_double": Nf4Double, "int8": Int8}
_DENSE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def settle(config: ResidualConfig, precision: Precision) -> ResidualConfig:
    """The same with `auto` replaced by what the precision says."""
    if config.storage != "auto":
        return config
    return replace(config, storage=next(name for name, dtype in _DENSE.items() if dtype == precision.residual_dtype))


def describe(config: ResidualConfig) -> str:
    """A configuration in a few words."""
    if config.storage not in _QUANTISED:
        return config.storage
    rounds = f", {config.iterations} rounds" if config.iterations > 1 else ""
    return f"{config.storage}, blocks of {config.block_size}{rounds}"


def storage_of(config: ResidualConfig, precision: Precision) -> Storage:
    """The storage that a configuration means.

    Raises:
        ValueError: the precision does not go with it.
    """
    name = settle(config, precision).storage
    if name in _QUANTISED:
        return _QUANTISED[name](config.block_size)
    if name == "fp32" and precision.name == "bf16":
        raise ValueError(
            "residual.storage: fp32 does not go with precision bf16, whose engine rounds the model; use mixed"
        )
    return Dense(_DENSE[name])


def choose(config: ResidualConfig, precision: Precision, device: torch.device) -> Storage:
    """The storage of a run, tried out on the device where that may fail.

    Raises:
        ValueError: the precision or the device does not go with it.
    """
    storage, name = storage_of(config, precision), config.storage
    if not storage.quantised:
        return storage
    ramp = torch.linspace(-1, 1, 4 * config.block_size, device=device).view(4, -1)
    try:
        lost = (storage.dense(storage.pack(ramp), tuple(ramp.shape), precision.compute_dtype) - ramp).abs().max().item()
    except Exception as error:  # whatever a library without a kernel for this device raises
        raise ValueError(f"residual.storage: {name} does not work on {device}: {error}") from error
    if not lost < 0.2:
        raise ValueError(f"residual.storage: {name} gives wrong numbers on {device} (off by {lost:.2g} of 1)")
    return storage


def _blocks(shape: torch.Size, block_size: int) -> int:
    return -(-torch.Size(shape).numel() // block_size)


def _bytes(count: int) -> tuple[torch.Size, torch.dtype]:
    return torch.Size((count,)), torch.uint8


def _parts(matrix: Tensor, block_size: int) -> Iterator[Tensor]:
    """The numbers of a matrix a piece after the other, in fp32, each piece of whole blocks."""
    for part in matrix.reshape(-1).split(_CHUNK):
        yield torch.nn.functional.pad(part.float(), (0, -len(part) % block_size))


def _to_nf4(matrix: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(codes, two a byte; fp32 scales)."""
    made = [
        _functional().quantize_4bit(part, blocksize=block_size, quant_type="nf4")
        for part in _parts(matrix, block_size)
    ]  # fmt: skip
    return torch.cat([codes.view(-1) for codes, _ in made]), torch.cat([state.absmax for _, state in made])


def _direct(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which bitsandbytes writes what is wanted in this one."""
    return dtype if dtype in _DIRECT else torch.float32


def _matrix(numbers: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Padded numbers as the matrix."""
    m, n = shape
    return numbers.view(-1)[: m * n].view(m, n).to(dtype)


def _as_bytes(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.uint8)


def _as_numbers(raw: Tensor) -> Tensor:
    """fp32 numbers from their bytes, which ZeRO-3 may have gathered at any position of a larger buffer."""
    return (raw if raw.storage_offset() % 4 == 0 else raw.clone()).view(torch.float32)


@functools.cache
def _even_code(device: torch.device) -> Tensor:
    return _functional().create_linear_map(signed=True).to(device)


@functools.cache
def _dynamic_code(device: torch.device) -> Tensor:
    """bitsandbytes' own map of 8 bits, finer near zero."""
    return _functional().create_dynamic_map().to(device)


@functools.cache
def _functional():
    """bitsandbytes, imported when it is needed: it takes a second."""
    import bitsandbytes.functional

    return bitsandbytes.functional


def _ops():
    """bitsandbytes' operators."""
    _functional()
    return torch.ops.bitsandbytes
