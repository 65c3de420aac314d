"""Digests that tell whether two tensors or files are the same, bit for bit.

The hash is XXH3 with 128 bits. It is as fast as memory, so a whole model can be hashed while it is read. It detects
accidental changes; it does not protect against someone who makes two different files on purpose that look alike.
"""

from pathlib import Path

import torch
import xxhash
from torch import Tensor

_CHUNK_BYTES = 2**24


def of_tensor(tensor: Tensor) -> str:
    """The digest of a tensor's numbers in row-major order. Shape and dtype do not enter it."""
    return xxhash.xxh3_128_hexdigest(raw(tensor))


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's numbers in row-major order, uint8. A contiguous tensor on the CPU is not copied."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def of_bytes(data: bytes) -> str:
    """The digest of a byte string."""
    return xxhash.xxh3_128_hexdigest(data)


def of_file(path: Path) -> str:
    """The digest of a file's bytes.

    Raises:
        OSError: the file cannot be read.
    """
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()
