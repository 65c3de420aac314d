"""Digests that tell whether two tensors or files are the same, bit for bit.

XXH3 with 128 bits: as fast as memory, so that a whole model is hashed while it is read. It finds every accident; it is
no protection against someone who wants two files to look alike.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

_CHUNK_BYTES = 2**24


def of_tensor(tensor: Tensor) -> str:
    """Of a tensor's numbers in row-major order; shape and dtype do not count."""
    return xxhash.xxh3_128_hexdigest(raw(tensor))


def raw(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor's numbers in row-major order; of a contiguous one on the CPU without a copy."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def of_tensors(tensors: Iterable[Tensor]) -> str:
    """Of the numbers of several tensors, one after the other, without ever holding them as one."""
    state = xxhash.xxh3_128()
    for tensor in tensors:
        state.update(raw(tensor))
    return state.hexdigest()


def of_bytes(data: bytes) -> str:
    """Of bytes."""
    return xxhash.xxh3_128_hexdigest(data)


def of_file(path: Path) -> str:
    """Of a file's bytes.

    Raises:
        OSError: it cannot be read.
    """
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()
