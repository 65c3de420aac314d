"""A frozen matrix packed into 4 or 8 bits per weight by bitsandbytes.

All packed tensors are uint8, also the fp32 scales, which are stored as their bytes: an engine that casts a model's
floating-point tensors to bf16 leaves them alone, and ZeRO-3 partitions and gathers them like any parameter.

Shapes, used as suffixes of tensor names: the matrix (M, N); T tokens. The numbers of the matrix in row-major order are
cut into blocks of `block_size`, the last of which is filled with zeros. Each block has one scale.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CODES, SCALES, RANGE = "residual", "residual_scales", "residual_scales_range"
"""Names of a layer's frozen tensors. A matrix that is not packed has only the first."""

_CHUNK = 2**20
"""How many numbers are quantised at once: on a CPU bitsandbytes takes many times their memory meanwhile."""

_SCALES_BLOCK = 256
"""How many scales of Nf4Double share a scale of their own. The number is fixed in bitsandbytes."""

_DIRECT = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes in which bitsandbytes computes."""

Layout = dict[str, tuple[torch.Size, torch.dtype]]
"""Shape and dtype of each tensor of a stored matrix, by name."""


class _Packed(ABC):
    """A packed matrix, of which a dense copy is made for as long as a product takes."""

    __slots__ = ()
    block_size: int

    @abstractmethod
    def dense(self, tensors: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The matrix (M, N) that the tensors stand for, in a dtype."""

    def linear(self, tensors: Sequence[Tensor], x_TN: Tensor, out_features: int, bias_M: Tensor | None) -> Tensor:
        """x W^T + bias, (T, M) in the dtype of x, without a gradient."""
        matrix_MN = self.dense(tensors, (out_features, x_TN.shape[-1]), x_TN.dtype)
        return torch.nn.functional.linear(x_TN, matrix_MN, bias_M)

    def joins(self, numel: int) -> bool:
        """Whether tensors of matrices of `numel` numbers, one after the other, are those of the joined matrix."""
        return numel % self.block_size == 0


@dataclass(frozen=True, slots=True)
class Int8(_Packed):
    """8 bits per weight, with an fp32 scale per block: the block's largest absolute value.

    The codes are evenly spaced between plus and minus the scale. With bitsandbytes' own map, which is finer near zero,
    the error of normally distributed weights would be 1.6 times as large.
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


class _FourBit(_Packed):
    """What 4-bit codes have in common, in whichever format their scales are stored."""

    __slots__ = ()

    @abstractmethod
    def _scales(self, tensors: Sequence[Tensor]) -> Tensor:
        """The fp32 scale of each block."""

    @abstractmethod
    def _scaling(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The scales as bitsandbytes' product takes them."""

    def dense(self, tensors: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        codes, scales = tensors[0], self._scales(tensors)
        padded = torch.Size((2 * codes.numel(),))
        state = _functional().QuantState(
            absmax=scales, shape=padded, blocksize=self.block_size, quant_type="nf4", dtype=_direct(dtype)
        )
        return _matrix(_functional().dequantize_4bit(codes.view(-1, 1), state), shape, dtype)

    def linear(self, tensors: Sequence[Tensor], x_TN: Tensor, out_features: int, bias_M: Tensor | None) -> Tensor:
        """x W^T + bias by bitsandbytes, which uses a fused kernel where the tokens are so few that it is faster."""
        # The kernel needs blocks that do not cross from one row of the matrix to the next.
        if x_TN.dtype not in _DIRECT or x_TN.shape[-1] % self.block_size or not len(x_TN):
            return super().linear(tensors, x_TN, out_features, bias_M)
        codes, shape = tensors[0], (out_features, x_TN.shape[-1])
        # The kernel reads 16 aligned bytes at once, but ZeRO-3 may have gathered the codes to any position of a buffer.
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
    """4 bits per weight (QLoRA's NF4: quantiles of the normal distribution), with an fp32 scale per block."""

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
    """NF4 with 8 bits per scale.

    Stored are the scales' mean in fp32, and the differences from it in 8 bits, 256 of which share an fp32 scale.
    """

    block_size: int
    names = (CODES, SCALES, RANGE)
    quantised = True

    def tensors(self, shape: torch.Size) -> Layout:
        blocks = _blocks(shape, self.block_size)
        codes = _bytes(blocks * self.block_size // 2)
        return {CODES: codes, SCALES: _bytes(blocks), RANGE: _bytes(4 * (1 - -blocks // _SCALES_BLOCK))}

    def joins(self, numel: int) -> bool:
        return False  # each matrix has a mean and a range of its own

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
        """The quantised scales as bitsandbytes takes them: their scales, their codes, the map of codes, their mean."""
        _, differences, span = tensors
        numbers = _as_numbers(span)
        return numbers[1:], differences, _dynamic_code(span.device), numbers[0]


def _blocks(shape: torch.Size, block_size: int) -> int:
    """The number of blocks of a matrix."""
    return -(-torch.Size(shape).numel() // block_size)


def _bytes(count: int) -> tuple[torch.Size, torch.dtype]:
    """Shape and dtype of a tensor of so many bytes."""
    return torch.Size((count,)), torch.uint8


def _parts(matrix: Tensor, block_size: int) -> Iterator[Tensor]:
    """The numbers of a matrix in fp32, piece by piece. Each piece consists of whole blocks."""
    for part in matrix.reshape(-1).split(_CHUNK):
        yield torch.nn.functional.pad(part.float(), (0, -len(part) % block_size))


def _to_nf4(matrix: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The NF4 codes of a matrix, two per byte, and the fp32 scales of its blocks."""
    made = [
        _functional().quantize_4bit(part, blocksize=block_size, quant_type="nf4")
        for part in _parts(matrix, block_size)
    ]  # fmt: skip
    return torch.cat([codes.view(-1) for codes, _ in made]), torch.cat([state.absmax for _, state in made])


def _direct(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which bitsandbytes is to write numbers that are wanted in this dtype."""
    return dtype if dtype in _DIRECT else torch.float32


def _matrix(numbers: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix (M, N) from its numbers and the zeros that fill its last block."""
    m, n = shape
    return numbers.view(-1)[: m * n].view(m, n).to(dtype)


def _as_bytes(numbers: Tensor) -> Tensor:
    """The bytes of fp32 numbers."""
    return numbers.contiguous().view(torch.uint8)


def _as_numbers(raw: Tensor) -> Tensor:
    """fp32 numbers from their bytes, which ZeRO-3 may have gathered to any position of a larger buffer."""
    return (raw if raw.storage_offset() % 4 == 0 else raw.clone()).view(torch.float32)


@functools.cache
def _even_code(device: torch.device) -> Tensor:
    """A map of 8-bit codes to evenly spaced numbers from -1 to 1."""
    return _functional().create_linear_map(signed=True).to(device)


@functools.cache
def _dynamic_code(device: torch.device) -> Tensor:
    """bitsandbytes' own map of 8-bit codes to numbers from -1 to 1, which is finer near zero."""
    return _functional().create_dynamic_map().to(device)


@functools.cache
def _functional():
    """bitsandbytes' functions. They are imported when they are needed, as that takes a second."""
    import bitsandbytes.functional

    return bitsandbytes.functional


def _ops():
    """bitsandbytes' operators, which importing it registers with torch."""
    _functional()
    return torch.ops.bitsandbytes
