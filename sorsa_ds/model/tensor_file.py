"""A safetensors file written one tensor at a time, so that its size does not matter to the memory."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sorsa_ds.model.sharding import TensorSpec
from sorsa_ds.runtime.digest import raw
from sorsa_ds.runtime.files import write_atomic

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""safetensors' names of dtypes."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def nbytes(spec: TensorSpec) -> int:
    """A tensor's size in the file."""
    return spec.shape.numel() * spec.dtype.itemsize


def write_tensors(path: Path, specs: list[TensorSpec], tensors: Iterator[Tensor]) -> None:
    """Write a file of tensors that come one after the other, as `specs` says.

    Wider dtypes must come first: a reader wants every tensor to lie at a multiple of its numbers' size.

    Raises:
        ValueError: the disk refuses.
    """
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        begin, end = end, end + nbytes(spec)
        header[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": [*spec.shape], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for spec in specs:
                file.write(raw(_as_said(next(tensors), spec)))  # a loop variable would keep the tensor before this one
        assert next(tensors, None) is None

    write_atomic(path, write)


def _as_said(tensor: Tensor, spec: TensorSpec) -> Tensor:
    assert (tensor.shape, tensor.dtype) == (spec.shape, spec.dtype), spec.name
    return tensor
